"""The fastest 1F1B pipeline, proven: branch and bound over stage boundaries, with recomputation by stage.

Recomputing less never makes a stage or a step slower, so of each stage only the cheapest recomputation that fits its
memory matters; what is left to choose are the boundaries. Candidates are cut off by lower bounds, and what remains is
simulated, many at a time.

The bounds are lengths of paths through the 1F1B graph (p stages, m micro-batches, w = p - 1 - k stages after stage k,
t = forward + backward): down to stage k (P, the t of those before), to the last stage and back (S, the t of those
after), stage k alternating, once more to the last stage and back, and up:

    T >= P + max(w F_k, S) + max(w B_k, S) + (m - w) t_k

Transfers are waited for by the receiver (`simulator.Program`), so that they count as work of its stage: of every
forward but the first stage's, of every backward but the last one's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moeforge.plan.problem import Options, PipelineProblem
from moeforge.plan.simulator import Array, program, simulate

_BATCH = 2048
_NEVER = 1e30
_LIMIT = 400_000
"""Candidates that are simulated before the search gives up proving."""


@dataclass(frozen=True)
class Split:
    """Stages as unit ranges, with the units that each recomputes; `seconds` is the simulated step, `lower_bound` what
    no other split of the problem can beat."""

    spans: tuple[tuple[int, int], ...]
    recomputed: tuple[tuple[int, ...], ...]
    seconds: float
    lower_bound: float

    @property
    def gap(self) -> float:
        """How far from optimal it may be: seconds / lower bound - 1."""
        return max(0.0, self.seconds / self.lower_bound - 1) if self.lower_bound else 0.0


def best_1f1b(problem: PipelineProblem, known: float = float("inf")) -> Split | None:
    """The split with the smallest simulated step, None where none fits the memory or is faster than `known`."""
    known = min(known, _even_seconds(problem) * (1 + 1e-9))
    return _Search(problem, known).run(known)


def _even_seconds(problem: PipelineProblem) -> float:
    """The step of stages with about equally many possible boundaries that recompute everything, if they fit: it tells
    the search early what is too slow."""
    at = (0, *problem.cuts, len(problem.units))
    if len(at) <= problem.pp:
        return _NEVER
    inner = np.linspace(0, len(at) - 1, problem.pp + 1).round().astype(int)
    spans = [(at[i], at[j]) for i, j in zip(inner, inner[1:], strict=False)]
    again = [[i for i in range(*span) if problem.units[i].recomputable] for span in spans]
    if problem.same_recompute is not None:
        return _NEVER
    if any(problem.peak_bytes(rank, [spans[rank]], [again[rank]]) > problem.memory for rank in range(problem.pp)):
        return _NEVER
    stages = [problem.stage(*span, units) for span, units in zip(spans, again, strict=True)]
    return simulate("1f1b", problem.pp, problem.micro_batches, stages, problem.transfer).step_seconds


class _Search:
    """Positions are indices into the list of possible boundaries; arrays are [stage, begin, end] over them."""

    def __init__(self, problem: PipelineProblem, known: float) -> None:
        self.problem, self.p, self.m = problem, problem.pp, problem.micro_batches
        self.at = (0, *problem.cuts, len(problem.units))
        first, last = np.arange(self.p) == 0, np.arange(self.p) == self.p - 1
        self.receiving = problem.transfer * ~first, problem.transfer * ~last
        units = [unit.time for unit in problem.units]
        self.forward, self.backward, self.update = (
            _ranges([getattr(unit, key) for unit in units], self.at) for key in ("forward", "backward", "update")
        )
        whole = len(units)
        if self.p > 1:
            self.update[0] += np.where(np.array(self.at) < whole, problem.extra_update(0, 1), 0.0)
            self.update[:, -1] += np.where(np.array(self.at) > 0, problem.extra_update(1, whole), 0.0)
        self.base = np.concatenate([[0.0], np.cumsum([u.forward + u.backward for u in units])])[list(self.at)]
        self.choice, self.extra = self._cheapest(known)
        waits = self.receiving[0] + self.receiving[1]
        self.work = self.forward + self.backward + self.extra + waits[:, None, None]
        self.waits_before = np.concatenate([[0.0], waits.cumsum()])
        self._bounds()

    def _cheapest(self, known: float) -> tuple[NDArray[np.int64], Array]:
        """Of every possible stage the option with the least recomputation that fits (-1: none), and its seconds."""
        problem, size = self.problem, len(self.at)
        chosen, extra = np.full((self.p, size, size), -1), np.full((self.p, size, size), _NEVER)
        found: dict[tuple[tuple[int, ...], bool, bool], NDArray[np.int64]] = {}
        for i in range(size - 1):
            for j in range(i + 1, size):
                begin, end = self.at[i], self.at[j]
                # A stage that alone takes longer than a known step, or whose weights alone do not fit, is none.
                too_long = self.m * (self.base[j] - self.base[i]) >= known
                if too_long or problem.static_bytes([(begin, end)]) > problem.memory:
                    continue
                composition = problem.composition(begin, end)
                options, key = problem.options(composition), (composition, begin == 0, end == len(problem.units))
                if key not in found:
                    found[key] = self._fitting(options, begin, end)
                chosen[:, i, j] = found[key]
                extra[:, i, j] = np.where(found[key] >= 0, options.extra[found[key]], _NEVER)
        return chosen, extra

    def _fitting(self, options: Options, begin: int, end: int) -> NDArray[np.int64]:
        """For every rank the first option that fits."""
        static = self.problem.static_bytes([(begin, end)])
        if static + self.problem.update_transient([(begin, end)]) > self.problem.memory:
            return np.full(self.p, -1)
        held = np.stack([options.held_bytes(counts) for counts in self.problem.in_flight])
        fits = static + held + options.transient <= self.problem.memory
        return np.where(fits.any(1), fits.argmax(1), -1)

    def _bounds(self) -> None:
        """Tables over prefixes [0, i) of k stages: least extra seconds, least longest update, least largest bound."""
        p, size = self.p, len(self.at)
        before, after = np.full((p + 1, size), _NEVER), np.full((p + 1, size), _NEVER)
        before[0, 0] = after[p, size - 1] = 0.0
        for k in range(p):
            before[k + 1] = (before[k][:, None] + self.extra[k]).min(0)
            last = p - 1 - k
            after[last] = (self.extra[last] + after[last + 1][None, :]).min(1)
        self.before, self.after = before, after
        self.rest, self.rest_update = np.full((p + 1, size), _NEVER), np.full((p + 1, size), _NEVER)
        self.rest[0, 0] = self.rest_update[0, 0] = 0.0
        for k in range(p):
            waits = self.waits_before[p] - self.waits_before[k + 1]
            suffix = self.base[-1] - self.base[None, :] + after[k + 1][None, :] + waits
            bound = self._stage_bound(k, np.arange(size)[:, None], np.arange(size)[None, :], suffix)
            self.rest[k + 1] = np.maximum(self.rest[k][:, None], bound).min(0)
            update = np.where(self.extra[k] < _NEVER, self.update, _NEVER)
            self.rest_update[k + 1] = np.maximum(self.rest_update[k][:, None], update).min(0)

    def _stage_bound(self, k: int, i: NDArray[np.int64], j: NDArray[np.int64], suffix: Array) -> Array:
        """The bound through stage k = [i, j), `suffix` seconds of work after it."""
        forward, work, ahead = self.forward[i, j] + self.receiving[0][k], self.work[k, i, j], self.p - 1 - k
        prefix = self.base[i] + self.before[k][i] + self.waits_before[k]
        ramps = np.maximum(ahead * forward, suffix) + np.maximum(ahead * (work - forward), suffix)
        return prefix + ramps + (self.m - ahead) * work

    def run(self, known: float) -> Split | None:
        size = len(self.at)
        lowest = self.rest[self.p, size - 1] + self.rest_update[self.p, size - 1]
        if lowest >= min(known, _NEVER):
            return None
        best, path = min(known, _NEVER), None
        # Nodes: stages k.. are fixed, from position path[:, k] on.
        start = np.zeros((1, self.p + 1), dtype=np.int64)
        start[:, self.p] = size - 1
        stack = [(self.p, start, np.zeros((1, self.p + 1)), np.full(1, lowest), np.zeros(1))]
        simulated, unproven = 0, np.inf
        while stack:
            k, paths, works, bounds, updates = stack.pop()
            alive = bounds < best * (1 - 1e-12)
            if not alive.any():
                continue
            if k == 0:
                order = np.argsort(np.where(alive, bounds, np.inf))[: int(alive.sum())]
                for part in (order[:_BATCH], order[_BATCH:]):
                    if len(part) and bounds[part[0]] < best:
                        seconds = self._simulate(paths[part]) + updates[part]
                        simulated += len(part)
                        if seconds.min() < best:
                            best, path = float(seconds.min()), paths[part[seconds.argmin()]]
                continue
            if simulated > _LIMIT:
                unproven = min(unproven, float(bounds[alive].min()))
                continue
            stack += self._expand(k, paths[alive], works[alive], bounds[alive], updates[alive], best)
        if path is None:
            return None
        spans = tuple((self.at[i], self.at[j]) for i, j in zip(path, path[1:], strict=False))
        recomputed = []
        for k, (begin, end) in enumerate(spans):
            options = self.problem.options(self.problem.composition(begin, end))
            numbers = options.numbers[self.choice[k, path[k], path[k + 1]]]
            recomputed.append(self.problem.recomputed_units(begin, end, numbers))
        return Split(spans, tuple(recomputed), best, min(best, unproven))

    def _expand(self, k: int, paths: NDArray[np.int64], works: Array, bounds: Array, updates: Array, best: float):  # type: ignore[no-untyped-def]
        """Children of nodes: where stage k - 1 may begin. Pieces, the most promising last."""
        stage, ends = k - 1, paths[:, k]
        begins = np.arange(len(self.at)) if stage else np.zeros(1, dtype=np.int64)
        i, j = begins[None, :], ends[:, None]
        suffix = works[:, k:].sum(1)[:, None]
        bound = np.maximum(self._stage_bound(stage, i, j, suffix), self.rest[stage][i])
        update = np.maximum(updates[:, None], self.update[i, j])
        total = np.maximum(bound + np.maximum(update, self.rest_update[stage][i]), bounds[:, None])
        node, where = np.nonzero(total < best * (1 - 1e-12))
        total, begin, update = total[node, where], begins[where], update[node, where]
        order = np.argsort(-total, kind="stable")
        node, begin = node[order], begin[order]
        made, grown = paths[node], works[node]
        made[:, stage] = begin
        grown[:, stage] = self.work[stage, begin, made[:, k]]
        new = (made, grown, total[order], update[order])
        pieces = range(0, len(node), _BATCH)
        return [(stage, *(array[start : start + _BATCH] for array in new)) for start in pieces]

    def _simulate(self, paths: NDArray[np.int64]) -> Array:
        k, i, j = np.arange(self.p)[:, None], paths[:, :-1].T, paths[:, 1:].T
        times = {
            "F": self.forward[i, j] + self.receiving[0][:, None],
            "B": self.backward[i, j] + self.extra[k, i, j] + self.receiving[1][:, None],
        }
        return program("1f1b", self.p, 1, self.m).seconds(times, 0.0)


def _ranges(values: Sequence[float], at: Sequence[int]) -> Array:
    """[i, j]: the sum of values[at[i]:at[j]]; zeros where j <= i."""
    total = np.concatenate([[0.0], np.cumsum(values)])[list(at)]
    return np.triu(total[None, :] - total[:, None])
