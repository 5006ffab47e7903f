"""A plan against uniform stages, from start to end: `python -m moeforge.bench.planned CONFIG.toml PROFILE.toml`.

`moeforge plan train` plans the training file for the calibrated profile; `torchrun -m moeforge train --plan` runs the
plan, and the uniform one that was printed beside it, in turns. What was promised is compared with what came out.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from moeforge.config.clusters import load_hardware
from moeforge.errors import RunError
from moeforge.layout import Layout

_TURNS, _STEPS, _WARM_UPS = 3, 5, 1


def main(config: str, profile: str, settings: list[str]) -> dict[str, Any]:
    """Steps of both, seconds: medians over all turns, the first step of each run left out."""
    with tempfile.TemporaryDirectory() as scratch:
        plan = Path(scratch) / "planned.json"
        result = _plan(config, profile, settings, plan)
        even = Path(scratch) / "uniform.json"
        _uniform(result, plan, even)
        seconds: dict[str, list[float]] = {"planned": [], "uniform": []}
        for turn in range(_TURNS):
            for name, file in (("planned", plan), ("uniform", even)):
                seconds[name] += _steps(config, profile, settings, file, Path(scratch) / f"{name}-{turn}")
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    promised = {"planned": result["step_ms"] / 1e3, "uniform": result["uniform"]["step_ms"] / 1e3}
    return {
        "stages": {
            "planned": [[stage["layers"], stage["recompute_units"]] for stage in result["stages"]],
            "uniform": [[stage["layers"], stage["recompute_units"]] for stage in result["uniform"]["stages"]],
        },
        "settings": settings,
        "schedule": result["schedule"],
        "micro_batches": result["micro_batches"],
        "micro_batch_sequences": result["micro_batch_sequences"],
        "promised_step_seconds": promised,
        "measured_step_seconds": medians,
        "measured": seconds,
        "promised_gain": promised["uniform"] / promised["planned"] - 1,
        "measured_gain": medians["uniform"] / medians["planned"] - 1,
    }


def _plan(config: str, profile: str, settings: list[str], out: Path) -> dict[str, Any]:
    arguments = [word for value in settings for word in ("--set", value)]
    command = [sys.executable, "-m", "moeforge", "plan", "train", config, "--cluster", profile, *arguments]
    done = subprocess.run([*command, "--out", str(out), "--json"], capture_output=True, text=True)
    if done.returncode:
        raise RunError(f"plan train failed: {done.stderr.strip()}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _uniform(result: dict[str, Any], plan: Path, out: Path) -> None:
    """The plan file of the uniform stages."""
    data = json.loads(plan.read_text())
    data["stages"] = [
        {"begin_unit": stage["units"][0], "end_unit": stage["units"][1], "recompute": stage["recompute_units"]}
        for stage in result["uniform"]["stages"]
    ]
    Layout.from_json(json.dumps(data)).write(out)


def _steps(config: str, profile: str, settings: list[str], plan: Path, run_dir: Path) -> list[float]:
    arguments = [f"run.dir={run_dir}", f"train.steps={_STEPS + _WARM_UPS}", "checkpoint.every=0", *settings]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    command += [str(load_hardware(profile).devices), "-m", "moeforge", "train", config, "--plan", str(plan)]
    done = subprocess.run(
        [*command, *(word for value in arguments for word in ("--set", value))], capture_output=True, text=True
    )
    if done.returncode:
        raise RunError(f"a run of {plan.name} failed: {done.stderr.strip().splitlines()[-1]}")
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row["seconds"] for row in rows if "seconds" in row][_WARM_UPS:]


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], sys.argv[2], sys.argv[3:]), indent=1))
