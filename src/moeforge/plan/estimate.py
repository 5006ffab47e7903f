"""Seconds of every unit on given hardware: from its cost, or as measured."""

from __future__ import annotations

import bisect
import functools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from moeforge.config.hardware import HardwareProfile, MeasuredModel, layer_fingerprint
from moeforge.errors import UserError
from moeforge.layout import unit_names
from moeforge.plan.cost import ELEMENT_BYTES, GroupName, Message, Pass, UnitCost, unit_cost
from moeforge.plan.memory import unit_kind
from moeforge.plan.times import UnitTime
from moeforge.plan.workload import Workload

_DTYPE = {"bf16": "bf16", "bf16_pure": "bf16", "fp32": "fp32", "fp64": "fp64"}


class Span(NamedTuple):
    """A process group: its ranks are `stride` apart."""

    size: int
    stride: int


class Estimator:
    """Times of a workload's units on a cluster. World ranks are those of `Layout`: tp fastest, then dp, then pp.

    A ring over m members a node, each with a link of its own, crosses nodes at m times one link's bandwidth. A
    collective costs its latency log2(size) times, an all-reduce twice as often, an all-to-all once.
    """

    def __init__(self, hardware: HardwareProfile, work: Workload) -> None:
        self.hardware, self.work = hardware, work
        dtype = _DTYPE[work.precision]
        if dtype not in hardware.matmul:
            known = ", ".join(hardware.matmul)
            raise UserError(
                f'model.precision = "{work.precision}": the hardware profile {hardware.name} has no matmul.{dtype}, '
                f"only {known}"
            )
        rates = hardware.matmul[dtype]
        self.sizes = [math.log(rate.flops) for rate in rates]
        self.rates = [rate.tflops * 1e12 for rate in rates]
        self.groups: dict[GroupName, Span] = {
            "tp": Span(work.tp, 1),
            "dp": Span(work.dp, work.tp),
            "dp_tp": Span(work.dp * work.tp, 1),
            "block": Span(work.block, 1),
            "expert_dp": Span(work.expert_dp, work.block),
        }

    def units(self) -> tuple[UnitTime, ...]:
        """All units in forward order."""
        names, model = unit_names(self.work.model), self.work.model
        measured = _find_measured(self.hardware, self.work)
        known: dict[tuple[str, int | None], UnitTime] = {}
        times = []
        for name in names:
            kind = unit_kind(model, name)
            key = kind, model.window(int(name.split(".")[1])) if kind == "attention" else None
            if key not in known:
                known[key] = self.unit(unit_cost(self.work, name))
                if measured is not None and kind in measured:
                    # What was measured had no replicas to sum gradients with.
                    alone = self.work.dp == 1
                    known[key] = measured[kind] if alone else replace(measured[kind], update=known[key].update)
            times.append(known[key])
        return tuple(times)

    def unit(self, cost: UnitCost) -> UnitTime:
        """Seconds of one unit."""
        forward = self.seconds(cost.forward)
        return UnitTime(
            forward=forward,
            backward=self.seconds(cost.backward),
            backward_input=self.seconds(cost.backward_input),
            backward_weight=self.seconds(cost.backward_weight),
            recompute=forward,
            update=self.seconds(cost.update),
        )

    def seconds(self, work: Pass) -> float:
        """A pass: matmuls, then memory-bound passes, then messages, less what of them hides behind the matmuls."""
        if not (work.matmuls or work.memory_bytes or work.messages):
            return 0.0
        compute = self.compute(work)
        moving = work.memory_bytes / (self.hardware.memory_gbytes_per_second * 1e9)
        return compute + moving + self.exposed(work, compute) + self.hardware.unit_overhead_us * 1e-6

    def compute(self, work: Pass) -> float:
        """Seconds of the matmuls."""
        return sum(matmul.times * matmul.flops / self.rate(matmul.flops) for matmul in work.matmuls)

    def exposed(self, work: Pass, compute: float) -> float:
        """Seconds of messages during which nothing is computed.

        Of a travel in c chunks the first is always waited for; the others hide behind (c - 1) / c of the matmuls.
        """
        plain = sum(self.message(message) for message in work.messages if not message.overlapped)
        hidden = sum(self.message(message) for message in work.messages if message.overlapped)
        c = self.work.overlap_chunks
        return plain + hidden / c + max(0.0, (hidden - compute) * (c - 1) / c)

    def rate(self, flops: float) -> float:
        """FLOP/s of a matmul of this size: interpolated over log size, the ends kept beyond."""
        if flops <= 0:
            return self.rates[0]
        size = math.log(flops)
        right = bisect.bisect_left(self.sizes, size)
        if right == 0:
            # A smaller matmul takes at least as long as the work is short: time falls no faster than the root of size.
            return self.rates[0] * math.exp((size - self.sizes[0]) / 2)
        if right == len(self.sizes):
            return self.rates[-1]
        share = (size - self.sizes[right - 1]) / (self.sizes[right] - self.sizes[right - 1])
        return self.rates[right - 1] * (1 - share) + self.rates[right] * share

    def message(self, message: Message) -> float:
        """Seconds of collectives."""
        size, stride = self.groups[message.group]
        return self.collective(message.operation, size, stride, message.bytes, message.times)

    def collective(self, operation: str, size: int, stride: int, sent: float, times: float = 1) -> float:
        """Seconds of so many collectives over `size` ranks, `stride` apart, in which each sends `sent` bytes in all."""
        if size <= 1 or sent <= 0:
            return 0.0
        inside, across = self.hardware.intra_node, self.hardware.inter_node
        members = self.members(size, stride)
        if members >= size:
            links = sent / (inside.gbytes_per_second * 1e9)
            latency = inside.latency_us
        else:
            latency = across.latency_us
            if operation == "all_to_all":
                outside = sent * (size - members) / (size - 1)
                links = max((sent - outside) / inside.gbytes_per_second, outside / across.gbytes_per_second) / 1e9
            else:
                links = max(sent / inside.gbytes_per_second, sent / (members * across.gbytes_per_second)) / 1e9
        hops = 1 if operation == "all_to_all" else math.ceil(math.log2(size))
        if operation == "all_reduce":
            hops *= 2
        return links + times * hops * latency * 1e-6

    def members(self, size: int, stride: int) -> int:
        """Ranks of a group on one node, where they are fewest."""
        return _placement(self.hardware.devices, self.hardware.devices_per_node, size, stride)[0]

    def outside_bytes(self, message: Message) -> float:
        """Of the bytes that a rank sends, those that leave its node: equal parts to all peers, the mean over ranks."""
        size, stride = self.groups[message.group]
        return message.bytes * _placement(self.hardware.devices, self.hardware.devices_per_node, size, stride)[1]

    def transfer(self) -> float:
        """Seconds of a hidden state, or its gradient, from one pipeline stage to the next."""
        sent = self.work.own_tokens * self.work.model.hidden_size * ELEMENT_BYTES[self.work.precision]
        return self._between_stages(sent)

    def tied_reduction(self) -> float:
        """Seconds in which the ranks of a tied embedding and head exchange and add up the owned parts of its gradient,
        in the type that gradients are summed in."""
        work = self.work
        wide = 8 if work.precision == "fp64" else 4
        owned = work.vocab_rows * work.model.hidden_size / (work.dp if work.zero else 1)
        return self._between_stages(owned * wide) + 2 * owned * wide / (self.hardware.memory_gbytes_per_second * 1e9)

    def _between_stages(self, sent: float) -> float:
        # On several nodes some boundary crosses them; all are costed like that one.
        link = self.hardware.intra_node if self.hardware.nodes == 1 else self.hardware.inter_node
        return sent / (link.gbytes_per_second * 1e9) + link.latency_us * 1e-6


@functools.lru_cache(maxsize=4096)
def _placement(devices: int, per_node: int, size: int, stride: int) -> tuple[int, float]:
    """Of all groups of `size` ranks, `stride` apart: the least number on one node, and the mean share of a rank's peers
    that are on other nodes. Groups fill `size * stride` consecutive ranks, and so on; nodes may cut them unevenly."""
    if size <= 1 or devices <= per_node:
        return size, 0.0
    width = size * stride
    least, apart, groups = size, 0, 0
    for begin in range(0, min(math.lcm(width, per_node), devices), width):
        for first in range(begin, begin + stride):
            held = Counter(rank // per_node for rank in range(first, first + width, stride)).values()
            least, apart, groups = min(least, *held), apart + size**2 - sum(n * n for n in held), groups + 1
    return least, apart / (groups * size * (size - 1))


def _find_measured(hardware: HardwareProfile, work: Workload) -> dict[str, UnitTime] | None:
    """Measured times by kind, for the same layers and micro-batch on one tensor-parallel rank."""
    if work.tp * work.block != 1:
        return None
    wanted = (layer_fingerprint(work.model), work.precision, work.micro_batch_sequences, work.sequence_length)
    for found in hardware.measured:
        if (found.fingerprint, found.precision, found.micro_batch_sequences, found.sequence_length) == wanted:
            return _times(found)
    return None


def _times(found: MeasuredModel) -> dict[str, UnitTime]:
    keys: Sequence[str] = UnitTime.__dataclass_fields__.keys()  # type: ignore[assignment]
    return {unit.kind: UnitTime(**{key: getattr(unit, key) for key in keys}) for unit in found.units}
