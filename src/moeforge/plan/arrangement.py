"""How the devices of a cluster may share a model: sizes, expert mode, schedule and micro-batch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from moeforge.config.hardware import HardwareProfile
from moeforge.config.model import ModelConfig
from moeforge.errors import UserError
from moeforge.layout import require_schedule

_CHUNKS = {"1f1b": (1,), "interleaved-1f1b": (2, 3, 4), "zero-bubble": (1,), "zbv": (2,)}


@dataclass(frozen=True)
class Arrangement:
    """Everything that a plan chooses before it divides the units."""

    pp: int
    dp: int
    tp: int
    ep: int
    etp: int
    schedule: str
    chunks: int
    micro_batch_sequences: int

    @property
    def expert_mode(self) -> str:
        """The name of (ep, etp) in [parallel]."""
        return mode_name(self.dp, self.tp, self.ep, self.etp)

    def describe(self) -> str:
        """One line for a reader."""
        chunks = f" x {self.chunks}" if self.chunks > 1 else ""
        experts = f"{self.expert_mode} (ep {self.ep}, etp {self.etp}), " if self.ep * self.etp > 1 else ""
        return (
            f"pp {self.pp}, dp {self.dp}, tp {self.tp}, {experts}{self.schedule}{chunks}, "
            f"micro-batches of {self.micro_batch_sequences}"
        )


def mode_name(dp: int, tp: int, ep: int, etp: int) -> str:
    """edp, ep or etp for the modes with a name (the first that fits), else custom."""
    named = {"edp": (tp, 1), "ep": (dp * tp, 1), "etp": (dp, tp)}
    return next((name for name, sizes in named.items() if sizes == (ep, etp)), "custom")


def expert_modes(model: ModelConfig, dp: int, tp: int, etp_fixed: int = 1) -> list[tuple[int, int]]:
    """All (ep, etp) for which there are experts enough: blocks of consecutive ranks, experts whole, cut tp ways, or as
    `etp_fixed` says."""
    if model.moe is None:
        return [(1, 1)]
    ranks, found = dp * tp, []
    for etp in sorted({1, tp, etp_fixed}):
        for ep in divisors(ranks // etp if ranks % etp == 0 else 0):
            if ep <= model.moe.num_experts and ranks % (ep * etp) == 0:
                found.append((ep, etp))
    return found


def arrangements(
    model: ModelConfig, hardware: HardwareProfile, batch_sequences: int, fixed: Mapping[str, Any], group: int = 1
) -> Iterator[Arrangement]:
    """All that the cluster, the batch and `fixed` (values of fields of `Arrangement`, or `expert_mode`) allow.

    tp stays inside a node. Interleaving has 2 to 4 stages a rank.
    """
    devices, per_node = hardware.devices, hardware.devices_per_node

    def allowed(key: str, values: Iterator[int] | list[int] | list[str]) -> list[Any]:
        return [fixed[key]] if key in fixed else list(values)

    for tp in allowed("tp", [tp for tp in divisors(devices) if per_node % tp == 0]):
        for pp in allowed("pp", [pp for pp in divisors(devices // tp) if pp <= model.num_layers]):
            dp = devices // (tp * pp)
            if tp * pp * dp != devices or fixed.get("dp", dp) != dp or batch_sequences % dp:
                continue
            modes = expert_modes(model, dp, tp, fixed.get("etp", 1))
            if model.moe is not None:
                modes = [mode for mode in modes if _wanted(mode, dp, tp, fixed)]
            own = batch_sequences // dp
            micros = allowed("micro_batch_sequences", _micro_batches(own, group))
            for micro in [micro for micro in micros if own % micro == 0]:
                for schedule, chunks in _schedules(model, pp, own // micro, fixed):
                    for ep, etp in modes:
                        yield Arrangement(pp, dp, tp, ep, etp, schedule, chunks, micro)


def _micro_batches(own: int, group: int) -> list[int]:
    """Sizes to try for a replica's `own` sequences: powers of two of a routing group, or of odd numbers all."""
    if own % (2 * group) == 0:
        return [group << i for i in range(6)]
    return [size for size in divisors(own) if size % group == 0 and size <= 32 * group]


def _wanted(mode: tuple[int, int], dp: int, tp: int, fixed: Mapping[str, Any]) -> bool:
    ep, etp = mode
    if "expert_mode" in fixed and fixed["expert_mode"] != "custom":
        return {"edp": (tp, 1), "ep": (dp * tp, 1), "etp": (dp, tp)}[fixed["expert_mode"]] == mode
    return fixed.get("ep", ep) == ep and fixed.get("etp", etp) == etp


def _schedules(model: ModelConfig, pp: int, micro_batches: int, fixed: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    if pp == 1:
        if fixed.get("schedule", "1f1b") == "1f1b" and fixed.get("chunks", 1) == 1:
            yield "1f1b", 1
        return
    for schedule, several in _CHUNKS.items():
        if fixed.get("schedule", schedule) != schedule:
            continue
        for chunks in (fixed["chunks"],) if "chunks" in fixed else several:
            if pp * chunks > 2 * model.num_layers:
                continue
            try:
                require_schedule(schedule, pp * chunks, pp, micro_batches)
            except UserError:
                continue
            yield schedule, chunks


def divisors(number: int) -> list[int]:
    """Ascending; none of 0."""
    small = [n for n in range(1, math.isqrt(max(number, 0)) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})
