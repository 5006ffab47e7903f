"""What the pipeline optimiser is given: units with their times and bytes, and where stages may begin."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moeforge.plan.actions import Action, schedule_actions
from moeforge.plan.simulator import Array
from moeforge.plan.times import UnitTime, stage_time


@dataclass(frozen=True)
class PlanUnit:
    """A unit on one rank: its times, the bytes that it holds all along (weights, gradients, optimizer state) and those
    of activations, per micro-batch, as `plan.activations` means them. `held_gradients` only where the schedule splits
    the backward pass. `recomputable`: a layer's unit."""

    time: UnitTime
    static: int = 0
    kept: int = 0
    checkpoint: int = 0
    forward_transient: int = 0
    backward_transient: int = 0
    held_gradients: int = 0
    recomputable: bool = True


class Options(NamedTuple):
    """All ways to recompute some units of a stage, least extra time first: how many of each class, the seconds that
    this adds to a backward, and the bytes of activations, kept for each micro-batch, transient, and held between the
    halves of a split backward."""

    numbers: NDArray[np.int64]
    extra: Array
    kept: Array
    transient: Array
    held_gradients: Array

    def held_bytes(self, in_flight: Sequence[Sequence[int]]) -> Array:
        """The most that each way keeps on a rank of one stage (see `PipelineProblem.in_flight`)."""
        most: Array = (np.array(in_flight) @ np.stack([self.kept, self.held_gradients])).max(0)
        return most


@dataclass(frozen=True)
class PipelineProblem:
    """Units in forward order to be divided over `pp * chunks` stages, of at least one unit each.

    `cuts` are the units before which a stage may begin, ascending, without the first. `boundary` bytes are kept for
    each micro-batch in flight beside the units' own. All along a stage keeps `received` bytes for each neighbour, and
    the head's rank `tied` ones where another rank has the embedding, with which it sums their gradients in
    `tied_reduction` seconds a step. `update_transient` gives the bytes of the update's buffers for a rank with these
    stages, which are there when activations are not. `memory` is the bytes that a rank may use. `same_recompute`:
    every stage recomputes so many units of each kind (or all that it has), instead of its own choice.
    """

    units: tuple[PlanUnit, ...]
    cuts: tuple[int, ...]
    pp: int
    micro_batches: int
    memory: float = float("inf")
    schedule: str = "1f1b"
    chunks: int = 1
    transfer: float = 0.0
    boundary: int = 0
    received: int = 0
    tied: int = 0
    tied_reduction: float = 0.0
    is_tied: bool = False
    update_transient: Callable[[Sequence[tuple[int, int]]], int] = lambda spans: 0
    same_recompute: int | None = None

    @property
    def stages(self) -> int:
        """Stages of all ranks."""
        return self.pp * self.chunks

    @functools.cached_property
    def classes(self) -> tuple[int, ...]:
        """The class of every unit: units with equal numbers are interchangeable."""
        numbers: dict[PlanUnit, int] = {}
        return tuple(numbers.setdefault(unit, len(numbers)) for unit in self.units)

    @functools.cached_property
    def _examples(self) -> tuple[PlanUnit, ...]:
        return tuple(dict.fromkeys(self.units))

    @functools.cached_property
    def _running(self) -> Array:
        """Units of each class before every unit: [U + 1, classes]."""
        one_hot = np.eye(len(self._examples))[list(self.classes)]
        return np.concatenate([np.zeros((1, one_hot.shape[1])), one_hot.cumsum(0)])

    def composition(self, begin: int, end: int) -> tuple[int, ...]:
        """How many units of each class a stage has."""
        return tuple(map(int, self._running[end] - self._running[begin]))

    def static_bytes(self, spans: Sequence[tuple[int, int]]) -> int:
        """Bytes that a rank with these stages holds all along."""
        count = len(self.units)
        copy = any(end == count for _, end in spans) and not any(begin == 0 for begin, _ in spans)
        own = sum(unit.static for begin, end in spans for unit in self.units[begin:end])
        neighbours = sum((begin > 0) + (end < count) for begin, end in spans)
        return own + self.received * neighbours + (self.tied if copy else 0)

    def stage(self, begin: int, end: int, recomputed: Sequence[int]) -> UnitTime:
        """Times of a stage."""
        again, last = set(recomputed), end == len(self.units)
        units = ((self.units[i].time, i in again) for i in range(begin, end))
        made = stage_time(units, begin == 0, self.is_tied and begin == 0 and last)
        return replace(made, update=made.update + self.extra_update(begin, end))

    def extra_update(self, begin: int, end: int) -> float:
        """What a tied matrix on two ranks adds to a stage's update: its gradients are summed over both, and the head's
        rank updates a copy."""
        first, last = begin == 0, end == len(self.units)
        if not self.is_tied or first == last or self.schedule == "zbv":
            return 0.0
        return self.tied_reduction + (self.units[0].time.update if last else 0.0)

    @functools.cached_property
    def _options(self) -> dict[tuple[int, ...], Options]:
        return {}

    def options(self, composition: tuple[int, ...]) -> Options:
        """The ways to recompute a stage of so many units of each class."""
        if composition not in self._options:
            self._options[composition] = self._enumerate(composition)
        return self._options[composition]

    def _enumerate(self, composition: tuple[int, ...]) -> Options:
        units = self._examples
        sizes = [n + 1 if unit.recomputable else 1 for n, unit in zip(composition, units, strict=True)]
        again = np.indices(sizes).reshape(len(sizes), -1).T.astype(np.int64)  # [ways, classes]
        if self.same_recompute is not None:
            wanted = [min(self.same_recompute, size - 1) for size in sizes]
            again = again[(again == wanted).all(1)]
        plain = np.array(composition) - again
        extra = again @ np.array([unit.time.recompute for unit in units])
        kept = again @ np.array([unit.checkpoint for unit in units]) + plain @ np.array([unit.kept for unit in units])
        if_plain = np.array([max(unit.forward_transient, unit.backward_transient) for unit in units])
        if_again = np.array([transient_if_recomputed(unit) for unit in units])
        transient = np.maximum((plain > 0) * if_plain, (again > 0) * if_again).max(1)
        kept = kept + self.boundary
        gradients = plain @ np.array([unit.held_gradients for unit in units])
        order = np.lexsort((transient, kept, extra))
        return Options(again[order], extra[order], kept[order], transient[order], gradients[order])

    @functools.cached_property
    def in_flight(self) -> tuple[tuple[tuple[int, ...], ...], ...]:
        """For every rank the maximal numbers of micro-batches that its stages, in ascending order, hold at once; and,
        after them, of those between the halves of a split backward."""
        actions = schedule_actions(self.schedule, self.pp, self.chunks, self.micro_batches)
        return tuple(_most_held(own) for own in actions)

    def recomputed_units(self, begin: int, end: int, numbers: Sequence[int]) -> tuple[int, ...]:
        """So many of each class, the first ones of the stage."""
        left = list(map(int, numbers))
        chosen = []
        for i in range(begin, end):
            if left[self.classes[i]]:
                left[self.classes[i]] -= 1
                chosen.append(i)
        return tuple(chosen)

    def peak_bytes(self, rank: int, spans: Sequence[tuple[int, int]], recomputed: Sequence[Sequence[int]]) -> int:
        """Largest number of bytes that a rank uses, with these units of its stages recomputed."""
        transient, kept, gradients = 0, list[int](), list[int]()
        for (begin, end), units in zip(spans, recomputed, strict=True):
            again, total = set(units), self.boundary
            for i in range(begin, end):
                unit = self.units[i]
                total += unit.checkpoint if i in again else unit.kept
                own = max(unit.forward_transient, unit.backward_transient)
                transient = max(transient, transient_if_recomputed(unit) if i in again else own)
            kept.append(total)
            gradients.append(sum(self.units[i].held_gradients for i in range(begin, end) if i not in again))
        held = most_bytes(self.in_flight[rank], kept, gradients)
        return self.static_bytes(spans) + max(held + transient, self.update_transient(spans))


def most_bytes(in_flight: Iterable[Sequence[int]], kept: Sequence[int], held_gradients: Sequence[int]) -> int:
    """The most that a rank's stages keep for micro-batches in flight (see `PipelineProblem.in_flight`), of bytes by
    stage."""
    sizes = (*kept, *held_gradients)
    return max(sum(n * each for n, each in zip(counts, sizes, strict=True)) for counts in in_flight)


def transient_if_recomputed(unit: PlanUnit) -> int:
    """Transient bytes of a recomputed unit: before its backward it runs again, beside the gradient of its output (as
    large as its input), and then there is also what it would have kept."""
    again = max(unit.backward_transient, unit.forward_transient + unit.checkpoint)
    return max(unit.forward_transient, again + unit.kept - unit.checkpoint)


def _most_held(actions: Sequence[Action]) -> tuple[tuple[int, ...], ...]:
    """The Pareto-largest vectors of micro-batches whose activations a rank's stages hold, and of those whose gradients
    wait for the weights' half. The first stage of all does both halves in the second (see `plan.stage_memory`)."""
    stages = sorted({action.stage for action in actions})
    split = {(a.stage, a.micro_batch) for a in actions if a.kind == "W"}
    held, waiting = dict.fromkeys(stages, 0), dict.fromkeys(stages, 0)
    seen: set[tuple[int, ...]] = set()
    for action in actions:
        if action.kind == "F":
            held[action.stage] += 1
        elif action.kind == "I" and (action.stage, action.micro_batch) in split:
            waiting[action.stage] += action.stage > 0
        else:
            held[action.stage] -= 1
            waiting[action.stage] -= action.kind == "W" and action.stage > 0
        seen.add((*held.values(), *waiting.values()))
    largest = [v for v in seen if not any(o != v and all(x <= y for x, y in zip(v, o, strict=True)) for o in seen)]
    return tuple(sorted(largest))
