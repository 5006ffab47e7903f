"""`moeforge bench serve`: tokens a second of ours and of the peers on one upcycled model, in alternating runs."""

from __future__ import annotations

import contextlib
import functools
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moeforge.bench.serve_llama import LlamaCpp
from moeforge.bench.serve_machine import machine
from moeforge.bench.serve_peers import cores, python_sides
from moeforge.bench.serve_side import Run, Side, WorkerSide, Workload

OURS = "moeforge"
TRIALS = 2
HOPELESS = 2.0
Rates = dict[str, list[float]]
Note = Callable[[str], None]


@dataclass
class Entry:
    """The sides of one engine that are still open, and for each workload the fastest side, its mode and the seconds of
    its better trial; `trials` has the rates of all trials, by workload and mode."""

    sides: list[Side] = field(default_factory=list)
    best: dict[str, tuple[Side, str, float]] = field(default_factory=dict)
    trials: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    first_tokens: dict[str, list[int]] = field(default_factory=dict)
    rates: Rates = field(default_factory=dict)
    foreign: dict[str, list[float | None]] = field(default_factory=dict)

    def drop_beaten(self) -> None:
        """Close the sides that are the fastest at nothing."""
        used = [side for side, _, _ in self.best.values()]
        for side in [side for side in self.sides if side not in used]:
            side.close()
            self.sides.remove(side)

    def close(self) -> None:
        for side in self.sides:
            side.close()


@dataclass
class ServeBench:
    """One upcycled model directory (Mixtral form in bf16, so that all sides compute the same).

    peers_dir    what `benchmarks/peers.sh` has filled; needed for vllm and llama.cpp
    scratch      a folder for files as large as the model
    concurrency  numbers of requests at once
    """

    model: Path
    vocab_size: int
    against: Sequence[str]
    peers_dir: Path | None
    scratch: Path
    concurrency: Sequence[int] = (1, 8, 32)
    prompt_tokens: int = 64
    new_tokens: int = 64
    prefill_tokens: int = 512
    runs: int = 3
    note: Note = field(default=print)

    def workloads(self) -> list[Workload]:
        """One a concurrency, and the prefill of one long prompt."""
        decode = [Workload(str(n), n, self.prompt_tokens, self.new_tokens) for n in self.concurrency]
        return [*decode, Workload(f"prefill_{self.prefill_tokens}", 1, self.prefill_tokens, 1)]

    def run(self) -> dict[str, Any]:
        """Try every side and mode, then take the fastest of each engine in turn, `runs` times each workload.

        Raises RunError where a side fails.
        """
        measured = machine()
        self.note("machine: " + ", ".join(f"{key} {value}" for key, value in measured.items()))
        entries: dict[str, Entry] = {}
        with contextlib.ExitStack() as stack:
            for name in (OURS, *self.against):
                entry = entries[name] = Entry()
                stack.callback(entry.close)
                self._enter(name, entry)
            for index in range(self.runs):
                self._round(entries, index)
        return self.result(entries, measured)

    def _enter(self, name: str, entry: Entry) -> None:
        """Load each side of an engine and try its modes."""
        for start in self._sides(name):
            side = start()
            entry.sides.append(side)
            for workload in self.workloads():
                for mode in side.modes(workload):
                    self._try(name, entry, side, workload, mode)
            entry.drop_beaten()

    def _try(self, name: str, entry: Entry, side: Side, workload: Workload, mode: str) -> None:
        """Run one mode twice, of which the better counts: the first pays for the warm-up. A mode whose first trial
        takes more than twice as long as the best so far gets no second one."""
        rates = entry.trials.setdefault(workload.name, {}).setdefault(mode, [])
        prompts = workload.prompts(self.vocab_size, 0)
        for _ in range(TRIALS):
            run = side.run(workload, prompts, mode)
            rates.append(workload.rate(run["seconds"]))
            entry.first_tokens.setdefault(workload.name, run.get("first_tokens", []))
            self.note(f"trial {name} ({mode}) {workload.name}: {_shown(workload, run)}")
            if workload.name not in entry.best or run["seconds"] < entry.best[workload.name][2]:
                entry.best[workload.name] = (side, mode, run["seconds"])
            if run["seconds"] > HOPELESS * entry.best[workload.name][2]:
                break

    def _sides(self, name: str) -> list[Callable[[], Side]]:
        if name == "llama.cpp":
            assert self.peers_dir is not None
            folder = self.peers_dir / "llama.cpp"
            return [lambda: LlamaCpp(folder, self.model, self.scratch, len(cores()))]
        limit = max(self.prefill_tokens + 1, self.prompt_tokens + self.new_tokens)
        specs = python_sides(name, self.model, self.peers_dir, max(self.concurrency), limit)
        return [functools.partial(WorkerSide, **spec) for spec in specs]

    def _round(self, entries: Mapping[str, Entry], index: int) -> None:
        for workload in self.workloads():
            prompts = workload.prompts(self.vocab_size, index + 1)
            for name, entry in entries.items():
                side, mode, _ = entry.best[workload.name]
                run = side.run(workload, prompts, mode)
                entry.rates.setdefault(workload.name, []).append(workload.rate(run["seconds"]))
                entry.foreign.setdefault(workload.name, []).append(run["foreign_share"])
                self.note(f"run {index + 1}/{self.runs} {name} {workload.name}: {_shown(workload, run)}")

    def result(self, entries: Mapping[str, Entry], measured: Mapping[str, Any]) -> dict[str, Any]:
        """The JSON object: ratios against the best peer, then everything that they come from."""
        ours, peers = entries[OURS], {name: entry for name, entry in entries.items() if name != OURS}
        prefill = f"prefill_{self.prefill_tokens}"
        ratios = {
            workload.name: best_ratio(
                ours.rates[workload.name], {name: entry.rates[workload.name] for name, entry in peers.items()}
            )
            for workload in self.workloads()
        }
        return {
            "ratio_at": {name: ratio for name, (ratio, _) in ratios.items() if name != prefill},
            f"ratio_{prefill}": ratios[prefill][0],
            "best_peer": {name: peer for name, (_, peer) in ratios.items()},
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": self.new_tokens,
            "runs": self.runs,
            OURS: self._entry(ours, ours),
            "peers": {name: self._entry(entry, ours) for name, entry in peers.items()},
            "machine": dict(measured),
        }

    def _entry(self, entry: Entry, ours: Entry) -> dict[str, Any]:
        names = list(entry.rates)
        shown: dict[str, Any] = {
            "tokens_per_second": {name: statistics.median(entry.rates[name]) for name in names},
            "runs_tokens_per_second": entry.rates,
            "foreign_cpu_share": entry.foreign,
            "trials_tokens_per_second": entry.trials,
            "settings": {name: entry.best[name][0].about | {"chosen": entry.best[name][1]} for name in names},
        }
        if entry is not ours:
            shown["ratio_at"] = {name: paired_ratio(ours.rates[name], entry.rates[name]) for name in names}
            shown["first_token_agreement"] = {
                name: agreement(ours.first_tokens[name], entry.first_tokens[name])
                for name in names
                if entry.first_tokens[name]
            }
        return shown


def _shown(workload: Workload, run: Run) -> str:
    foreign = run["foreign_share"]
    busy = "" if foreign is None else f", {foreign:.0%} of the processors elsewhere"
    return f"{workload.rate(run['seconds']):.1f} tokens/s{busy}"


def paired_ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The median over rounds of ours / theirs, each pair from one round."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def best_ratio(ours: Sequence[float], peers: Mapping[str, Sequence[float]]) -> tuple[float, str]:
    """`paired_ratio` against the peer with the highest median rate, and that peer."""
    best = max(peers, key=lambda name: statistics.median(peers[name]))
    return paired_ratio(ours, peers[best]), best


def agreement(ours: Sequence[int], theirs: Sequence[int]) -> float:
    """The share of prompts whose first new token is the same: whether both really run this model."""
    return sum(a == b for a, b in zip(ours, theirs, strict=True)) / len(ours)
