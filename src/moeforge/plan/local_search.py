"""Good splits for the schedules whose best one is not proven: steepest descent over boundaries, on the simulator."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np

from moeforge.layout import SCHEDULES
from moeforge.plan.exact import Split, best_1f1b
from moeforge.plan.problem import PipelineProblem, most_bytes, transient_if_recomputed
from moeforge.plan.simulator import columns, program, update_seconds
from moeforge.plan.times import UnitTime

Begins = tuple[int, ...]
"""Indices into the list of possible boundaries: where each stage begins, and the end."""
_SIMULATED_AT_ONCE = 512


def best_split(problem: PipelineProblem, known: float = float("inf")) -> Split | None:
    """The split with the smallest simulated step that is found: for 1F1B, and on a single rank, the best of all. None
    where none fits the memory or is faster than `known`."""
    if problem.schedule == "1f1b" or problem.pp == 1:
        return best_1f1b(problem, known)
    return _Descent(problem).run(known)


def stages_of(schedule: str, pp: int, chunks: int) -> list[tuple[int, ...]]:
    """The stages of every rank, as `Layout.stages_of`."""
    if schedule == "zbv":
        return [(rank, 2 * pp - 1 - rank) for rank in range(pp)]
    return [tuple(range(rank, pp * chunks, pp)) for rank in range(pp)]


def lower_bound(problem: PipelineProblem) -> float:
    """What no split and no schedule can beat: the mean work of a rank, and the way of one micro-batch through all
    stages, each with the mean update."""
    times = [unit.time for unit in problem.units]
    split = SCHEDULES[problem.schedule][0] != 1 or problem.schedule == "zero-bubble"
    whole = [min(t.backward, t.backward_input + t.backward_weight) if split else t.backward for t in times]
    work = sum(t.forward for t in times) + sum(whole)
    once = sum(t.forward + min(t.backward_input, t.backward) for t in times)
    update = sum(t.update for t in times) / problem.pp
    return max(problem.micro_batches * work / problem.pp, once + 2 * problem.transfer * (problem.pp - 1)) + update


class _Descent:
    def __init__(self, problem: PipelineProblem) -> None:
        self.problem = problem
        self.at = (0, *problem.cuts, len(problem.units))
        self.owners = stages_of(problem.schedule, problem.pp, problem.chunks)
        self.program = program(problem.schedule, problem.pp, problem.chunks, problem.micro_batches)
        self.known_choices: dict[tuple[int, tuple[tuple[int, int], ...]], list[tuple[int, ...]] | None] = {}
        self.known_times: dict[tuple[int, int, tuple[int, ...]], UnitTime] = {}
        self.seen: dict[Begins, float] = {}

    def run(self, known: float) -> Split | None:
        bound = lower_bound(self.problem)
        if len(self.at) - 1 < self.problem.stages or bound >= known:
            return None
        best, seconds = None, float("inf")
        for start in self._starts():
            found, reached = self._descend(start)
            if reached < seconds:
                best, seconds = found, reached
        if best is None or seconds >= known:
            return None
        spans = self._spans(best)
        recomputed = self._recomputed(spans)
        assert recomputed is not None
        return Split(spans, recomputed, seconds, bound)

    def _starts(self) -> Iterator[Begins]:
        """Equal time a stage; and equal numbers of possible boundaries."""
        count, stages = len(self.at) - 1, self.problem.stages
        work = np.cumsum([0.0, *(unit.time.forward + unit.time.backward for unit in self.problem.units)])[list(self.at)]
        for scale in (work, np.arange(count + 1.0)):
            targets = scale[-1] * np.arange(1, stages) / stages
            inner = np.abs(scale[None, :] - targets[:, None]).argmin(1)
            begins = [0, *map(int, inner), count]
            for k in range(1, stages):  # at least one unit each
                begins[k] = min(max(begins[k], begins[k - 1] + 1), count - stages + k)
            yield tuple(begins)

    def _descend(self, start: Begins) -> tuple[Begins, float]:
        self._evaluate([start])
        here = start
        while True:
            near = list(self._neighbours(here))
            self._evaluate(near)
            best = min(near, key=self.seen.__getitem__, default=here)
            if self.seen[best] >= self.seen[here] * (1 - 1e-12):
                return here, self.seen[here]
            here = best

    def _neighbours(self, here: Begins) -> Iterator[Begins]:
        """A run of successive boundaries moved together: work goes from one stage to another, those between slide."""
        for first in range(1, len(here) - 1):
            for last in range(first, len(here) - 1):
                for move in (-1, 1):
                    moved = (*here[:first], *(b + move for b in here[first : last + 1]), *here[last + 1 :])
                    if all(a < b for a, b in pairwise(moved)):
                        yield moved

    def _evaluate(self, candidates: Sequence[Begins]) -> None:
        new: list[tuple[Begins, list[UnitTime]]] = []
        for begins in candidates:
            if begins not in self.seen:
                spans = self._spans(begins)
                recomputed = self._recomputed(spans)
                self.seen[begins] = float("inf")
                if recomputed is not None:
                    times = [self._time(*span, units) for span, units in zip(spans, recomputed, strict=True)]
                    new.append((begins, times))
        for start in range(0, len(new), _SIMULATED_AT_ONCE):
            part = new[start : start + _SIMULATED_AT_ONCE]
            seconds = self.program.seconds(columns([times for _, times in part]), self.problem.transfer)
            for (begins, times), pipeline in zip(part, seconds, strict=True):
                update = update_seconds(self.problem.schedule, self.problem.pp, times)
                self.seen[begins] = float(pipeline) + update

    def _spans(self, begins: Begins) -> tuple[tuple[int, int], ...]:
        return tuple((self.at[a], self.at[b]) for a, b in pairwise(begins))

    def _time(self, begin: int, end: int, recomputed: tuple[int, ...]) -> UnitTime:
        key = (begin, end, recomputed)
        if key not in self.known_times:
            self.known_times[key] = self.problem.stage(*key)
        return self.known_times[key]

    def _recomputed(self, spans: Sequence[tuple[int, int]]) -> tuple[tuple[int, ...], ...] | None:
        """The units that each stage recomputes so that its rank fits; None where one cannot."""
        made: dict[int, tuple[int, ...]] = {}
        for rank, stages in enumerate(self.owners):
            own = tuple(spans[stage] for stage in stages)
            if (rank, own) not in self.known_choices:
                self.known_choices[rank, own] = recompute_until_it_fits(self.problem, rank, own)
            chosen = self.known_choices[rank, own]
            if chosen is None:
                return None
            made |= dict(zip(stages, chosen, strict=True))
        return tuple(made[stage] for stage in range(len(spans)))


def recompute_until_it_fits(
    problem: PipelineProblem, rank: int, spans: Sequence[tuple[int, int]]
) -> list[tuple[int, ...]] | None:
    """Units to recompute on a rank of several stages: those that free most bytes for their time, until it fits; then
    those are kept again without which it fits as well. None if it does not fit even so."""
    fit = _Fit(problem, rank, spans)
    held = [max(counts[i] for counts in problem.in_flight[rank]) for i in range(len(spans))]
    candidates = []
    for index, (begin, end) in enumerate(spans):
        for i in range(begin, end):
            unit = problem.units[i]
            freed = held[index] * (unit.kept - unit.checkpoint)
            if unit.recomputable and freed > 0:
                candidates.append((unit.time.recompute / freed, index, i))
    candidates.sort()
    chosen: list[tuple[int, int]] = []
    for _, index, i in candidates:
        if fit.fits():
            break
        fit.recompute(index, i, 1)
        chosen.append((index, i))
    if not fit.fits():
        return None
    for index, i in list(chosen):
        fit.recompute(index, i, -1)
        if fit.fits():
            chosen.remove((index, i))
        else:
            fit.recompute(index, i, 1)
    return [tuple(sorted(i for index, i in chosen if index == own)) for own in range(len(spans))]


class _Fit:
    """`PipelineProblem.peak_bytes` of a rank, kept up to date while units change between kept and recomputed."""

    def __init__(self, problem: PipelineProblem, rank: int, spans: Sequence[tuple[int, int]]) -> None:
        self.problem, self.held = problem, problem.in_flight[rank]
        self.static, self.update = problem.static_bytes(spans), problem.update_transient(spans)
        self.kept = [problem.boundary + sum(unit.kept for unit in problem.units[begin:end]) for begin, end in spans]
        self.gradients = [sum(unit.held_gradients for unit in problem.units[begin:end]) for begin, end in spans]
        self.plain = Counter(problem.classes[i] for begin, end in spans for i in range(begin, end))
        self.again: Counter[int] = Counter()
        units = dict(zip(problem.classes, problem.units, strict=True))
        self.if_plain = {c: max(u.forward_transient, u.backward_transient) for c, u in units.items()}
        self.if_again = {c: transient_if_recomputed(u) for c, u in units.items()}

    def recompute(self, stage: int, unit: int, count: int) -> None:
        """One unit more (1) or less (-1) is recomputed."""
        number = self.problem.classes[unit]
        self.plain[number] -= count
        self.again[number] += count
        self.kept[stage] -= count * (self.problem.units[unit].kept - self.problem.units[unit].checkpoint)
        self.gradients[stage] -= count * self.problem.units[unit].held_gradients

    def fits(self) -> bool:
        """Whether the rank has the memory."""
        held = most_bytes(self.held, self.kept, self.gradients)
        transients = [self.if_plain[c] for c, n in self.plain.items() if n]
        transients += [self.if_again[c] for c, n in self.again.items() if n]
        return self.static + max(held + max(transients), self.update) <= self.problem.memory
