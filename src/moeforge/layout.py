"""A plan as data: which stage runs which units, and which rank holds which part of every layer.

The model is a flat list of units: "embed", then "layers.i.attention" and "layers.i.ffn" for every layer,
then "head" (final norm and output matrix). A stage is a slice of that list; a shard is the part that one
tensor-parallel rank holds.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol

from moeforge.errors import UserError
from moeforge.files import write_whole
from moeforge.partition import Range, partition

FFN_BLOCK = 16
"""FFN columns move between ranks in blocks of 16: what tensor cores and packed formats want."""


class ExpertShape(Protocol):
    """What a layout needs to know of the routed experts."""

    @property
    def num_experts(self) -> int: ...
    @property
    def expert_size(self) -> int: ...


class ModelShape(Protocol):
    """What a layout needs to know of a model; `moeforge.config.model.ModelConfig` fits."""

    @property
    def num_layers(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def ffn_size(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def moe(self) -> ExpertShape | None: ...
    def is_moe_layer(self, layer: int) -> bool: ...
    def fingerprint(self) -> str: ...


@dataclass(frozen=True)
class Stage:
    """A pipeline stage: units begin_unit (included) to end_unit (excluded), and those whose activations are
    recomputed in the backward pass instead of kept."""

    begin_unit: int
    end_unit: int
    recompute: tuple[str, ...] = ()


@dataclass(frozen=True)
class Shard:
    """What one tensor-parallel rank holds, one (begin, end) a layer.

    In a routed layer the rank holds `ffn_columns` of the experts in `experts`; in a dense one `experts` is
    (0, 0). A KV group is a key head, its value head and the query heads that share them.
    """

    kv_groups: tuple[Range, ...]
    ffn_columns: tuple[Range, ...]
    experts: tuple[Range, ...]
    vocab_rows: Range


@dataclass(frozen=True)
class Layout:
    """Exact ranges for every stage and rank, bound to one model (by fingerprint) and number of processes."""

    fingerprint: str
    world_size: int
    stages: tuple[Stage, ...]
    ranks: tuple[Shard, ...]

    @classmethod
    def single(cls, config: ModelShape, recompute: str | Sequence[str] = "none") -> Layout:
        """One process holds everything. `recompute` as in `resolve_recompute`."""
        return cls.tensor_parallel(config, 1, recompute=recompute)

    @classmethod
    def tensor_parallel(
        cls,
        config: ModelShape,
        ranks: int,
        weights: Sequence[float] | None = None,
        recompute: str | Sequence[str] = "none",
    ) -> Layout:
        """Splits every layer over `ranks`, after `weights` (equal if None); sizes need not divide.

        Attention by whole KV groups, dense feed-forwards by blocks of 16 columns, routed ones by whole
        experts, embedding and head by vocabulary rows. What does not divide rotates over the ranks from layer
        to layer.
        """
        groups = _Rotation(ranks, weights)
        columns = _Rotation(ranks, weights)
        experts = _Rotation(ranks, weights)
        by_layer = []
        for layer in range(config.num_layers):
            if config.moe is not None and config.is_moe_layer(layer):
                held = experts.next(config.moe.num_experts)
                whole = (0, config.moe.expert_size)
                width = tuple(whole if begin < end else (0, 0) for begin, end in held)
            else:
                held = ((0, 0),) * ranks
                width = columns.next(config.ffn_size, FFN_BLOCK)
            by_layer.append((groups.next(config.num_kv_heads), width, held))
        rows = partition(config.vocab_size, ranks, weights)[0]
        shards = []
        for rank in range(ranks):
            kv, ffn, routed = (tuple(layer[kind][rank] for layer in by_layer) for kind in range(3))
            shards.append(Shard(kv, ffn, routed, rows[rank]))
        stage = Stage(0, len(unit_names(config)), resolve_recompute(config, recompute))
        return cls(config.fingerprint(), ranks, (stage,), tuple(shards))

    def check(self, config: ModelShape, world_size: int) -> None:
        """Raises UserError unless this layout is for this model and `world_size`, and covers all of it."""
        if self.fingerprint != config.fingerprint():
            raise UserError(
                f"layout fingerprint = {self.fingerprint}: the plan was made for another model (this one is "
                f"{config.fingerprint()}); plan again"
            )
        if self.world_size != world_size:
            raise UserError(
                f"layout world_size = {self.world_size}: the plan needs {self.world_size} processes, "
                f"but {world_size} run; plan again"
            )
        names = unit_names(config)
        _check_cover("stages", [(stage.begin_unit, stage.end_unit) for stage in self.stages], len(names))
        for index, stage in enumerate(self.stages):
            for name in stage.recompute:
                if name in _ENDS or name not in names[stage.begin_unit : stage.end_unit]:
                    raise UserError(f'layout stages.{index}.recompute = "{name}": not a layer of that stage')
        _check_cover("vocab_rows", [shard.vocab_rows for shard in self.ranks], config.vocab_size)
        for index, shard in enumerate(self.ranks):
            for key in ("kv_groups", "ffn_columns", "experts"):
                if len(getattr(shard, key)) != config.num_layers:
                    raise UserError(f"layout ranks.{index}.{key}: must have {config.num_layers} layers")
        for layer in range(config.num_layers):
            groups = [shard.kv_groups[layer] for shard in self.ranks]
            _check_cover(f"kv_groups of layer {layer}", groups, config.num_kv_heads)
            columns = [shard.ffn_columns[layer] for shard in self.ranks]
            if config.moe is None or not config.is_moe_layer(layer):
                _check_cover(f"ffn_columns of layer {layer}", columns, config.ffn_size)
                continue
            held = [shard.experts[layer] for shard in self.ranks]
            _check_cover(f"experts of layer {layer}", held, config.moe.num_experts)
            for (begin, end), part in zip(held, columns, strict=True):
                if begin < end and part != (0, config.moe.expert_size):
                    raise UserError(f"layout ffn_columns of layer {layer}: experts must be whole, got {part}")

    def to_json(self) -> str:
        """Text that `from_json` reads back to an equal layout."""
        return json.dumps(dataclasses.asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Layout:
        """The inverse of `to_json`; raises UserError for anything else."""
        try:
            data = json.loads(text)
            return cls(
                fingerprint=_str(data.pop("fingerprint")),
                world_size=_int(data.pop("world_size")),
                stages=tuple(_stage(**stage) for stage in data.pop("stages")),
                ranks=tuple(_shard(**shard) for shard in data.pop("ranks")),
                **data,
            )
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise UserError(f"not a layout as `moeforge plan` writes it ({reason})") from error

    def write(self, path: Path) -> None:
        """Writes `to_json` to `path`, whole or not at all."""
        write_whole(path, self.to_json() + "\n")

    @classmethod
    def read(cls, path: Path) -> Layout:
        """Reads what `write` wrote; raises UserError naming the file."""
        try:
            return cls.from_json(path.read_text(encoding="utf-8", errors="replace"))
        except OSError as error:
            raise UserError(f"{path}: cannot read the layout ({error.strerror})") from error
        except UserError as error:
            raise UserError(f"{path}: {error}") from error


_ENDS = ("embed", "head")


def unit_names(config: ModelShape) -> tuple[str, ...]:
    """The 2 L + 2 units in the order in which the forward pass runs them."""
    layers = (f"layers.{layer}.{kind}" for layer in range(config.num_layers) for kind in ("attention", "ffn"))
    return ("embed", *layers, "head")


def resolve_recompute(config: ModelShape, choice: str | Sequence[str]) -> tuple[str, ...]:
    """Unit names for "none", "all", "attention", "ffn" or a list of layer units, in forward order.

    Embedding and head are not among them: one keeps nothing worth recomputing, the other is the last to run.
    Raises UserError naming the nearest unit for an unknown one.
    """
    units = tuple(name for name in unit_names(config) if name not in _ENDS)
    kinds: dict[str, Callable[[str], bool]] = {
        "none": lambda name: False,
        "all": lambda name: True,
        "attention": lambda name: name.endswith(".attention"),
        "ffn": lambda name: name.endswith(".ffn"),
    }
    if isinstance(choice, str):
        if choice not in kinds:
            allowed = f"{', '.join(kinds)} or a list of units"
            raise UserError(f'model.recompute = "{choice}": must be one of {allowed}')
        return tuple(filter(kinds[choice], units))
    for name in choice:
        if name not in units:
            nearest = difflib.get_close_matches(name, units, 1, cutoff=0)
            hint = f"; did you mean {nearest[0]}?" if nearest else ""
            raise UserError(f'model.recompute = "{name}": not a layer unit of this model{hint}')
    return tuple(name for name in units if name in set(choice))


class _Rotation:
    """Successive partitions over the same ranks, the remainder carried from one to the next."""

    def __init__(self, ranks: int, weights: Sequence[float] | None) -> None:
        self.ranks, self.weights = ranks, weights
        self.carry: tuple[Fraction, ...] | None = None

    def next(self, size: int, block: int = 1) -> tuple[Range, ...]:
        """Ranges over `size` whose inner boundaries are multiples of `block`."""
        ranges, self.carry = partition(-(-size // block), self.ranks, self.weights, self.carry)
        return tuple((min(begin * block, size), min(end * block, size)) for begin, end in ranges)


def _check_cover(what: str, ranges: Sequence[Range], size: int) -> None:
    position = 0
    for begin, end in ranges:
        if begin != position or end < begin:
            raise UserError(f"layout {what}: range {begin}..{end} does not continue at {position}")
        position = end
    if position != size:
        raise UserError(f"layout {what}: end at {position}, must end at {size}")


def _int(value: Any) -> int:
    if type(value) is not int:
        raise TypeError(f"{value!r} is not an integer")
    return value


def _str(value: Any) -> str:
    if type(value) is not str:
        raise TypeError(f"{value!r} is not a string")
    return value


def _range(value: Any) -> Range:
    begin, end = value
    return _int(begin), _int(end)


def _stage(begin_unit: Any, end_unit: Any, recompute: Any) -> Stage:
    return Stage(_int(begin_unit), _int(end_unit), tuple(map(_str, recompute)))


def _shard(kv_groups: Any, ffn_columns: Any, experts: Any, vocab_rows: Any) -> Shard:
    kv, ffn, routed = (tuple(map(_range, ranges)) for ranges in (kv_groups, ffn_columns, experts))
    return Shard(kv, ffn, routed, _range(vocab_rows))
