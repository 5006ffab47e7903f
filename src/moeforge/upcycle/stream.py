"""Dense checkpoints in, mixture out: one weight read, one weight written, one layer's feed-forward in memory.

Legend: D hidden, F dense FFN width, E experts.
"""

from __future__ import annotations

import math
import re
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moeforge.checkpoint import (
    Checkpoint,
    ShardWriter,
    canonical_shapes,
    check_finite,
    dequantized,
    require_disk_space,
)
from moeforge.checkpoint.writer import SHARD_BYTES, interrupted_job, partial_directory
from moeforge.config.model import ModelConfig
from moeforge.errors import UserError
from moeforge.heap import return_freed_memory
from moeforge.upcycle.config import UpcycleConfig
from moeforge.upcycle.memory import PeakAnonymous
from moeforge.upcycle.methods import FFN, make_expert, make_router
from moeforge.upcycle.sources import check_donors, check_remains, job

_STORED = {"bf16": torch.bfloat16, "fp32": torch.float32}
_ROUTED = re.compile(r"model\.layers\.(\d+)\.block_sparse_moe\.(?:gate|experts\.(\d+)\.(w[123]))\.(?:weight|scale)")


@dataclass(frozen=True)
class UpcycleResult:
    """What was made. `seconds` and `peak_anonymous_bytes` (None off Linux) are of this run alone."""

    path: Path
    config: ModelConfig
    params_total: int
    params_active: int
    seconds: float
    peak_anonymous_bytes: int | None
    resumed: bool


def upcycle(
    source: Checkpoint | Sequence[Checkpoint],
    out: str | Path,
    config: UpcycleConfig,
    progress: Callable[[int, int], None] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> UpcycleResult:
    """Writes the mixture that `config` describes as the model directory `out`.

    Several donors of one shape share the experts, a contiguous block of copies each. `out` appears when it is
    complete. A killed run goes on after its last whole shard when called again with the same arguments, and
    ends byte for byte as if it had not been killed. `progress` is called with (bytes written, bytes in
    all).

    Raises UserError for sources that are not dense, not finite or not alike, for an `out` in use, and for an
    interrupted run with other arguments; RunError where the disk is too small or gets full.
    """
    begin = time.monotonic()
    return_freed_memory()
    donors = tuple(map(dequantized, (source,) if isinstance(source, Checkpoint) else source))
    out = Path(out)
    with PeakAnonymous() as memory:
        target = config.model_config(donors[0].config)
        check_donors(donors, config)
        maker = _Maker(donors, config)
        sizes = {name: maker.bytes_of(name, shape) for name, shape in canonical_shapes(target).items()}
        this = job(donors, config)
        check_remains(out, interrupted_job(out), this)
        require_disk_space(out, sum(sizes.values()) - _bytes_in(partial_directory(out)))
        writer = ShardWriter(out, target, shard_bytes, this)
        done = frozenset(writer.done)
        try:
            donors[0].copy_tokenizer(writer.partial)
            written = 0
            for name, size in sizes.items():
                if name not in done:
                    writer.add(name, maker.weight(name))
                written += size
                if progress is not None:
                    progress(written, sum(sizes.values()))
        except UserError:  # the sources are at fault: there is nothing to go on with
            shutil.rmtree(writer.partial)
            raise
        writer.finish()
    return UpcycleResult(
        path=out,
        config=target,
        params_total=target.parameters(),
        params_active=target.parameters(active=True),
        seconds=time.monotonic() - begin,
        peak_anonymous_bytes=memory.peak_bytes,
        resumed=bool(done),
    )


class _Maker:
    """Gives the mixture's weights by canonical name; holds one layer's dense feed-forwards and one expert."""

    def __init__(self, donors: Sequence[Checkpoint], config: UpcycleConfig) -> None:
        self._donors, self._config = donors, config
        self._layer: tuple[int, list[FFN]] = (-1, [])
        self._expert: tuple[tuple[int, int], FFN | None] = ((-1, -1), None)

    def weight(self, name: str) -> Tensor:
        """The weight as it will be stored. UserError if a donor's is not finite."""
        match = _ROUTED.fullmatch(name)
        if match is None:
            return self._shared(name)
        layer = int(match[1])
        if layer != self._layer[0]:
            self._expert = ((-1, -1), None)
            self._layer = (-1, [])  # let go of the last layer before the next is read
            self._layer = (layer, [self._dense(donor, layer) for donor in self._donors])
        ffns = self._layer[1]
        if name.endswith(".scale"):
            return torch.tensor(self._config.gate_scale, dtype=ffns[0].w1.dtype)
        if match[2] is None:
            return make_router(ffns[0].w1.shape[1], self._config, layer, ffns[0].w1.dtype)
        index = (layer, int(match[2]))
        if index != self._expert[0]:
            self._expert = (index, make_expert(ffns, self._config, *index))
        weight: Tensor = getattr(self._expert[1], match[3])
        return weight

    def bytes_of(self, name: str, shape: tuple[int, ...]) -> int:
        """What a weight will take on disk."""
        match = _ROUTED.fullmatch(name)
        origin = name if match is None else f"model.layers.{match[1]}.mlp.gate_proj.weight"
        return math.prod(shape) * self._stored(self._donors[0].dtype(origin)).itemsize

    def _shared(self, name: str) -> Tensor:
        """A weight that is no expert's: the first donor's, or the donors' mean (BTX, arXiv 2403.07816)."""
        if self._config.shared == "first" or len(self._donors) == 1:
            return self._read(self._donors[0], name)
        first = self._read(self._donors[0], name)
        total = first.to(torch.promote_types(first.dtype, torch.float32), copy=True)
        for donor in self._donors[1:]:
            total += self._read(donor, name)
        return total.div_(len(self._donors)).to(first.dtype)

    def _dense(self, donor: Checkpoint, layer: int) -> FFN:
        parts = (f"model.layers.{layer}.mlp.{part}_proj.weight" for part in ("gate", "up", "down"))
        return FFN(*(self._read(donor, name) for name in parts))

    def _read(self, donor: Checkpoint, name: str) -> Tensor:
        weight = donor.tensor(name)
        check_finite(f"{donor.path}: {name}", weight)
        return weight.to(self._stored(self._donors[0].dtype(name)))

    def _stored(self, dtype: torch.dtype) -> torch.dtype:
        return _STORED.get(self._config.dtype, dtype)


def _bytes_in(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.iterdir()) if directory.is_dir() else 0
