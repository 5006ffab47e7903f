"""llama.cpp as a side of the serving benchmark: its own `llama-batched-bench`, which times without loading."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moeforge.bench.serve_busy import Foreign
from moeforge.bench.serve_side import Prompts, Run, Workload
from moeforge.errors import RunError


def seconds_of(output: str, workload: Workload) -> float:
    """Of the last run that `llama-batched-bench --output-format jsonl` printed. Raises RunError if there is none.

    The prompt's pass gives the first new token, so for one new token that pass is all.
    """
    rows: list[dict[str, Any]] = [
        json.loads(line) for line in output.splitlines() if line.startswith("{") and line.rstrip().endswith("}")
    ]
    rows = [row for row in rows if (row["pp"], row["pl"]) == (workload.prompt_tokens, workload.concurrency)]
    if not rows:
        raise RunError("bench serve: llama.cpp printed no measurement")
    return float(rows[-1]["t_pp"] + (rows[-1]["t_tg"] if workload.new_tokens > 1 else 0.0))


def _children_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _run(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RunError(f"bench serve: {Path(command[0]).name} failed: {last}")
    return done.stdout


class LlamaCpp:
    """Made from a model directory, which is converted to a BF16 GGUF file in `scratch` first.

    It draws its own random prompts, one for each sequence, and feeds random tokens back: nothing is sampled.
    Raises RunError where llama.cpp fails.
    """

    name = "llama.cpp"

    def __init__(self, folder: Path, model: Path, scratch: Path, threads: int) -> None:
        self._gguf, self._threads = scratch / "model.gguf", threads
        self._bench = folder / "build" / "bin" / "llama-batched-bench"
        convert = [folder / "convert_hf_to_gguf.py", model, "--outfile", self._gguf, "--outtype", "bf16"]
        _run([sys.executable, *map(str, convert)])
        said = subprocess.run([self._bench, "--version"], capture_output=True, text=True)
        lines = (said.stdout + said.stderr).splitlines()
        version = next((line.partition(":")[2].strip() for line in lines if line.startswith("version:")), "unknown")
        self.about: dict[str, Any] = {"version": version, "threads": threads, "weights": "BF16 GGUF"}

    def modes(self, workload: Workload) -> Sequence[str]:
        return ("flash-attn on", "flash-attn off")

    def run(self, workload: Workload, prompts: Prompts, mode: str) -> Run:
        new = max(1, workload.new_tokens - 1)
        count = str(workload.concurrency)
        context = workload.concurrency * (workload.prompt_tokens + new)
        foreign = Foreign(_children_seconds)
        output = _run([
            str(self._bench), "-m", str(self._gguf), "-t", str(self._threads), "-fa", mode.split()[-1],
            "-c", str(context), "-npp", str(workload.prompt_tokens), "-ntg", str(new),
            "-npl", f"{count},{count}", "--output-format", "jsonl",  # twice: the first warms up
        ])  # fmt: skip
        return {"seconds": seconds_of(output, workload), "foreign_share": foreign.share()}

    def close(self) -> None:
        self._gguf.unlink(missing_ok=True)
