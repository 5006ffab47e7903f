"""Making a layout from sizes: everything divided as evenly as it goes, remainders rotating from layer to layer."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise

from moeforge.errors import UserError
from moeforge.layout.layout import ExpertShard, Layout, Shard, Stage
from moeforge.layout.schedule import require_schedule
from moeforge.layout.shape import FFN_BLOCK, ModelShape
from moeforge.layout.units import ENDS, resolve_recompute, unit_names
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
    recompute_layers: Sequence[int] | None = None,
) -> Layout:
    """Splits `config` over pp * dp * tp processes; sizes need not divide.

    Attention goes by whole KV groups, dense feed-forwards by columns and the vocabulary by rows over the tp ranks,
    after `weights` (equal if None); experts over ep ranks (None: tp, which is EDP) and their columns over etp ranks,
    after the weights of the ranks that hold them. Columns move in blocks of 16 where there is a block for every rank.
    `stages` are the layers of each of the pp * chunks stages in multiples of a half (one residual unit), as even as
    whole layers allow if None; the embedding goes to the first, the head to the last. `recompute` as in
    `resolve_recompute`, or `recompute_layers`: how many of its layers, from its first, each stage recomputes.

    Raises UserError naming the key of [parallel] for what does not fit.
    """
    ep = tp if ep is None else ep
    if dp * tp % (ep * etp):
        raise UserError(f"parallel.ep x etp = {ep} x {etp}: must divide dp x tp = {dp} x {tp}")
    count = pp * chunks
    require_schedule(schedule, count, pp)
    made = _stages(config, _stage_begins(config, count, stages), recompute, recompute_layers)
    ranks = _shards(config, tp, weights)
    block = _expert_shards(config, dp * tp, ep, etp, weights)
    return Layout(config.fingerprint(), pp * dp * tp, pp, dp, schedule, made, ranks, ep, etp, block)


def _stage_begins(config: ModelShape, count: int, stages: Sequence[float] | None) -> list[int]:
    """First unit of every stage, and one past the last."""
    if stages is None:
        if count > config.num_layers:
            raise UserError(
                f"parallel.pp x chunks = {count}: must be at most the model's {config.num_layers} layers, unless "
                "parallel.stages says what each stage holds"
            )
        stages = [end - begin for begin, end in partition(config.num_layers, count)[0]]
    shown = _show(stages)
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


def _stages(
    config: ModelShape, begins: Sequence[int], recompute: str | Sequence[str], layers: Sequence[int] | None
) -> tuple[Stage, ...]:
    names, again = unit_names(config), set(resolve_recompute(config, recompute))
    spans = list(pairwise(begins))
    if layers is not None:
        if len(layers) != len(spans):
            raise UserError(
                f"parallel.recompute_layers = {_show(layers)}: must have one number for each of the {len(spans)} stages"
            )
        again = {name for i, (begin, end) in enumerate(spans) for name in _first_layers(names[begin:end], i, layers[i])}
    return tuple(Stage(begin, end, tuple(n for n in names[begin:end] if n in again)) for begin, end in spans)


def _first_layers(own: Sequence[str], stage: int, wanted: int) -> list[str]:
    """The units of a stage's first layers, of which the first and the last may be halves."""
    layers = list(dict.fromkeys(name.rpartition(".")[0] for name in own if name not in ENDS))
    if not 0 <= wanted <= len(layers):
        raise UserError(
            f"parallel.recompute_layers.{stage} = {wanted}: must be 0 to {len(layers)}, the stage's number of layers"
        )
    return [name for name in own if name.rpartition(".")[0] in layers[:wanted]]


def _shards(config: ModelShape, tp: int, weights: Sequence[float] | None) -> tuple[Shard, ...]:
    groups, columns = _Rotation(tp, weights), _Rotation(tp, weights)
    kv, dense = [], []
    for layer in range(config.num_layers):
        kv.append(groups.next(config.num_kv_heads))
        routed = config.is_moe_layer(layer)
        dense.append(_NOTHING * tp if routed else columns.next(config.ffn_size, FFN_BLOCK))
    rows = partition(config.vocab_size, tp, weights)[0]
    return tuple(Shard(_of(rank, kv), _of(rank, dense), rows[rank]) for rank in range(tp))


def _expert_shards(
    config: ModelShape, ranks: int, ep: int, etp: int, weights: Sequence[float] | None
) -> tuple[ExpertShard, ...]:
    experts_weights: list[Fraction] | None = None
    columns_weights: list[Fraction] | None = None
    if weights is not None:
        experts_weights, columns_weights = [Fraction(0)] * ep, [Fraction(0)] * etp
        for rank in range(ranks):  # the ranks of a stage that hold the same experts, or columns, weigh together
            weight = Fraction(weights[rank % len(weights)])
            experts_weights[rank // etp % ep] += weight
            columns_weights[rank % etp] += weight
    experts, columns = _Rotation(ep, experts_weights), _Rotation(etp, columns_weights)
    held, widths = [], []
    for layer in range(config.num_layers):
        moe = config.moe if config.is_moe_layer(layer) else None
        held.append(experts.next(moe.num_experts) if moe else _NOTHING * ep)
        widths.append(columns.next(moe.expert_size, FFN_BLOCK) if moe else _NOTHING * etp)
    return tuple(ExpertShard(_of(i, held), _of(j, widths)) for i in range(ep) for j in range(etp))


_NOTHING: tuple[Range, ...] = ((0, 0),)


def _of(rank: int, by_layer: Sequence[tuple[Range, ...]]) -> tuple[Range, ...]:
    return tuple(layer[rank] for layer in by_layer)


def _show(numbers: Sequence[float]) -> str:
    return f"[{', '.join(f'{number:g}' for number in numbers)}]"


class _Rotation:
    """Successive partitions over the same ranks, the remainder carried from one to the next."""

    def __init__(self, ranks: int, weights: Sequence[Fraction | float] | None) -> None:
        self.ranks, self.weights = ranks, weights
        self.carry: tuple[Fraction, ...] | None = None

    def next(self, size: int, block: int = 1) -> tuple[Range, ...]:
        """Ranges over `size` whose inner boundaries are multiples of `block`, if it has a block for every rank."""
        if size < block * self.ranks:
            block = 1
        ranges, self.carry = partition(-(-size // block), self.ranks, self.weights, self.carry)
        return tuple((min(begin * block, size), min(end * block, size)) for begin, end in ranges)
