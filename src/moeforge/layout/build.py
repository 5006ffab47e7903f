"""Making a layout from sizes: everything divided as evenly as it goes, remainders rotating from layer to layer."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from moeforge.errors import UserError
from moeforge.layout.layout import ExpertShard, Layout, Shard, Stage
from moeforge.layout.schedule import require_schedule
from moeforge.layout.shape import FFN_BLOCK, ModelShape
from moeforge.layout.units import resolve_recompute, unit_names
from moeforge.partition import Range, partition


def build_layout(
    config: ModelShape,
    *,
    pp: int = 1,
    dp: int = 1,
    tp: int = 1,
    ep: int | None = None,
    etp: int = 1,
    weights: Sequence[float] | None = None,
    stages: Sequence[float] | None = None,
    schedule: str = "1f1b",
    chunks: int = 1,
    recompute: str | Sequence[str] = "none",
    recompute_layers: Sequence[int] = (),
) -> Layout:
    """Splits `config` over pp * dp * tp processes; sizes need not divide.

    Attention goes by whole KV groups, dense feed-forwards by blocks of 16 columns and the vocabulary by rows over the
    tp ranks, after `weights` (equal if None); experts over ep ranks (None: tp, which is EDP) and their columns over
    etp ranks. `stages` are the layers of each of the pp * chunks stages in multiples of a half (one residual unit),
    as even as whole layers allow if None; the embedding goes to the first, the head to the last. `recompute` as in
    `resolve_recompute`, or `recompute_layers`: how many of its layers, from its first, each stage recomputes.

    Raises UserError naming the key of [parallel] for what does not fit.
    """
    ep = tp if ep is None else ep
    if dp * tp % (ep * etp):
        raise UserError(f"parallel.ep x etp = {ep} x {etp}: must divide dp x tp = {dp} x {tp}")
    if config.moe is not None and ep > config.moe.num_experts:
        raise UserError(f"parallel.ep = {ep}: must be at most the number of experts ({config.moe.num_experts})")
    count = pp * chunks
    require_schedule(schedule, count, pp)
    if config.num_layers < count and stages is None:
        raise UserError(
            f"parallel.pp x chunks = {pp} x {chunks}: more stages than the model's {config.num_layers} layers"
        )
    begins = _stage_begins(config, count, stages)
    again = set(resolve_recompute(config, recompute))
    names = unit_names(config)
    made = []
    for index, (begin, end) in enumerate(zip(begins, begins[1:], strict=False)):
        own = names[begin:end]
        chosen = _first_layers(own, index, recompute_layers) if recompute_layers else [n for n in own if n in again]
        made.append(Stage(begin, end, tuple(chosen)))
    if recompute_layers and len(recompute_layers) != count:
        raise UserError(f"parallel.recompute_layers: must have one number for each of the {count} stages")
    ranks, expert_ranks = _shards(config, tp, ep, etp, weights)
    return Layout(config.fingerprint(), pp * dp * tp, pp, dp, schedule, tuple(made), ranks, ep, etp, expert_ranks)


def _stage_begins(config: ModelShape, count: int, stages: Sequence[float] | None) -> list[int]:
    """First unit of every stage, and one past the last."""
    if stages is None:
        stages = [end - begin for begin, end in partition(config.num_layers, count)[0]]
    shown = ", ".join(f"{layers:g}" for layers in stages)
    if len(stages) != count:
        raise UserError(f"parallel.stages = {shown}: must have one number for each of the {count} stages")
    if any(layers < 0 or layers * 2 != int(layers * 2) for layers in stages):
        raise UserError(f"parallel.stages = {shown}: must be multiples of 0.5 (half a layer), not negative")
    if sum(stages) != config.num_layers:
        raise UserError(
            f"parallel.stages = {shown}: must sum to the model's {config.num_layers} layers, not {sum(stages):g}"
        )
    begins, unit = [0], 1
    for layers in stages:
        unit += int(layers * 2)
        begins.append(unit)
    begins[-1] += 1  # the head
    return begins


def _first_layers(own: Sequence[str], stage: int, counts: Sequence[int]) -> list[str]:
    layers = dict.fromkeys(name.rpartition(".")[0] for name in own if name.startswith("layers."))
    wanted = counts[stage] if stage < len(counts) else 0
    if not 0 <= wanted <= len(layers):
        raise UserError(f"parallel.recompute_layers.{stage} = {wanted}: must be 0 to {len(layers)}, the stage's layers")
    chosen = set(list(layers)[:wanted])
    return [name for name in own if name.rpartition(".")[0] in chosen]


def _shards(
    config: ModelShape, tp: int, ep: int, etp: int, weights: Sequence[float] | None
) -> tuple[tuple[Shard, ...], tuple[ExpertShard, ...]]:
    groups, columns = _Rotation(tp, weights), _Rotation(tp, weights)
    experts, expert_columns = (
        _Rotation(ep, weights if ep == tp else None),
        _Rotation(etp, weights if etp == tp else None),
    )
    kv, dense, held, widths = [], [], [], []
    for layer in range(config.num_layers):
        kv.append(groups.next(config.num_kv_heads))
        if config.moe is not None and config.is_moe_layer(layer):
            dense.append(((0, 0),) * tp)
            held.append(experts.next(config.moe.num_experts))
            widths.append(expert_columns.next(config.moe.expert_size, FFN_BLOCK))
        else:
            dense.append(columns.next(config.ffn_size, FFN_BLOCK))
            held.append(((0, 0),) * ep)
            widths.append(((0, 0),) * etp)
    rows = partition(config.vocab_size, tp, weights)[0]

    def of(rank: int, by_layer: list[tuple[Range, ...]]) -> tuple[Range, ...]:
        return tuple(layer[rank] for layer in by_layer)

    ranks = tuple(Shard(of(rank, kv), of(rank, dense), rows[rank]) for rank in range(tp))
    block = tuple(ExpertShard(of(i, held), of(j, widths)) for i in range(ep) for j in range(etp))
    return ranks, block


class _Rotation:
    """Successive partitions over the same ranks, the remainder carried from one to the next."""

    def __init__(self, ranks: int, weights: Sequence[float] | None) -> None:
        self.ranks, self.weights = ranks, weights
        self.carry: tuple[Fraction, ...] | None = None

    def next(self, size: int, block: int = 1) -> tuple[Range, ...]:
        """Ranges over `size` whose inner boundaries are multiples of `block`."""
        ranges, self.carry = partition(-(-size // block), self.ranks, self.weights, self.carry)
        return tuple((min(begin * block, size), min(end * block, size)) for begin, end in ranges)
