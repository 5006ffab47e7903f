"""Layout: exact ranges for every stage and rank, bound to one model and one number of processes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeforge.errors import UserError
from moeforge.files import write_whole
from moeforge.layout.shape import ModelShape
from moeforge.partition import Range


@dataclass(frozen=True)
class Stage:
    """A pipeline stage: units begin_unit (included) to end_unit (excluded), and those whose activations are
    recomputed in the backward pass instead of kept. It may be empty."""

    begin_unit: int
    end_unit: int
    recompute: tuple[str, ...] = ()


@dataclass(frozen=True)
class Shard:
    """What one tensor-parallel rank holds, one (begin, end) a layer.

    `ffn_columns` are those of dense layers, (0, 0) in routed ones. A KV group is a key head, its value head and the
    query heads that share them.
    """

    kv_groups: tuple[Range, ...]
    ffn_columns: tuple[Range, ...]
    vocab_rows: Range


@dataclass(frozen=True)
class ExpertShard:
    """What one rank of an expert block holds, one (begin, end) a layer: which experts, and which columns of each of
    them; (0, 0) in dense layers."""

    experts: tuple[Range, ...]
    columns: tuple[Range, ...]


@dataclass(frozen=True)
class Coordinates:
    """Where a rank stands. `expert_rank` is its number in its expert block, the index into `Layout.expert_ranks`."""

    pp: int
    dp: int
    tp: int
    ep: int
    etp: int
    expert_dp: int
    expert_rank: int


@dataclass(frozen=True)
class Layout:
    """Which stage runs which units, and which rank holds which part of every layer.

    World rank = (pp * dp_size + dp) * tp_size + tp. The dp x tp ranks of a stage are numbered dp * tp_size + tp; that
    number divides into (expert_dp, ep, etp), etp fastest. So the ep x etp ranks of a *block*, among which tokens
    travel to their experts, are consecutive: with ep = tp and etp = 1 (EDP) the block is the tensor-parallel group.
    `micro_batch_sequences`: what the stages were planned for, None where the training file says it.
    """

    fingerprint: str
    world_size: int
    pp: int
    dp: int
    schedule: str
    stages: tuple[Stage, ...]
    ranks: tuple[Shard, ...]
    ep: int
    etp: int
    expert_ranks: tuple[ExpertShard, ...]
    micro_batch_sequences: int | None = None

    @classmethod
    def single(cls, config: ModelShape, recompute: str | Sequence[str] = "none") -> Layout:
        """One process holds everything. `recompute` as in `resolve_recompute`."""
        from moeforge.layout.build import build_layout

        return build_layout(config, recompute=recompute)

    @property
    def tp(self) -> int:
        """Tensor-parallel size."""
        return len(self.ranks)

    @property
    def expert_dp(self) -> int:
        """Number of blocks that hold copies of the same experts."""
        return self.dp * self.tp // (self.ep * self.etp)

    @property
    def chunks(self) -> int:
        """Stages of each pipeline rank."""
        return len(self.stages) // self.pp

    def stages_of(self, pp_rank: int) -> tuple[int, ...]:
        """The stages of a pipeline rank: every pp-th, or for zbv one on the way down and one on the way up."""
        if self.schedule == "zbv":
            return pp_rank, 2 * self.pp - 1 - pp_rank
        return tuple(range(pp_rank, len(self.stages), self.pp))

    def pp_rank_of(self, stage: int) -> int:
        """The pipeline rank that runs a stage."""
        return next(rank for rank in range(self.pp) if stage in self.stages_of(rank))

    def stage_of_unit(self, unit: int) -> int:
        """The stage that runs the unit with this number."""
        return next(i for i, stage in enumerate(self.stages) if stage.begin_unit <= unit < stage.end_unit)

    def coordinates(self, rank: int) -> Coordinates:
        """Where a world rank stands."""
        pp, inside = divmod(rank, self.dp * self.tp)
        dp, tp = divmod(inside, self.tp)
        expert_dp, expert_rank = divmod(inside, self.ep * self.etp)
        ep, etp = divmod(expert_rank, self.etp)
        return Coordinates(pp, dp, tp, ep, etp, expert_dp, expert_rank)

    def check(self, config: ModelShape, world_size: int) -> None:
        """Raises UserError unless this layout is for this model and `world_size`, and covers all of it."""
        from moeforge.layout.check import check_layout

        check_layout(self, config, world_size)

    def to_json(self) -> str:
        """Text that `from_json` reads back to an equal layout."""
        return json.dumps(dataclasses.asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Layout:
        """The inverse of `to_json`; raises UserError for anything else."""
        try:
            data = json.loads(text)
            numbers = {key: _int(data.pop(key)) for key in ("world_size", "pp", "dp", "ep", "etp")}
            micro = data.pop("micro_batch_sequences", None)
            return cls(
                fingerprint=_str(data.pop("fingerprint")),
                schedule=_str(data.pop("schedule")),
                stages=tuple(_stage(**stage) for stage in data.pop("stages")),
                ranks=tuple(_shard(**shard) for shard in data.pop("ranks")),
                expert_ranks=tuple(_expert_shard(**shard) for shard in data.pop("expert_ranks")),
                micro_batch_sequences=None if micro is None else _int(micro),
                **numbers,
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


def _ranges(values: Any) -> tuple[Range, ...]:
    return tuple(map(_range, values))


def _stage(begin_unit: Any, end_unit: Any, recompute: Any) -> Stage:
    return Stage(_int(begin_unit), _int(end_unit), tuple(map(_str, recompute)))


def _shard(kv_groups: Any, ffn_columns: Any, vocab_rows: Any) -> Shard:
    return Shard(_ranges(kv_groups), _ranges(ffn_columns), _range(vocab_rows))


def _expert_shard(experts: Any, columns: Any) -> ExpertShard:
    return ExpertShard(_ranges(experts), _ranges(columns))
