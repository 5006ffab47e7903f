"""Peak memory and step time of recomputation settings: `python -m moeforge.bench.recompute JOB.json`.

Every setting runs in two fresh processes under torchrun, since a heap never shows that it has shrunk; settings take
turns.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from moeforge.bench.plan_accuracy import DEFAULTS, model_of, plan_config, plan_trainer
from moeforge.config.parallel import layout_for
from moeforge.errors import RunError
from moeforge.parallel import Mesh, launch


def main(job: dict[str, Any]) -> dict[str, Any]:
    """Keys of `job`: as in `bench.plan_accuracy`, with `settings` (name -> {"stages": [..], "recompute_layers": [..]}),
    `steps` and `runs`. Returns for each setting the peak resident bytes of each rank and the median step."""
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in job["settings"]}
    for _ in range(job["runs"]):
        for name, setting in job["settings"].items():
            results[name].append(_run(job | setting))
    return {
        "job": job,
        "settings": {
            name: {
                "peak_bytes": [statistics.median(run["peak_bytes"][rank] for run in runs) for rank in range(2)],
                "max_peak_bytes": statistics.median(max(run["peak_bytes"]) for run in runs),
                "step_seconds": statistics.median(s for run in runs for s in run["step_seconds"]),
                "runs": runs,
            }
            for name, runs in results.items()
        },
    }


def _run(job: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "job.json"
        file.write_text(json.dumps(job))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        done = subprocess.run([*command, "-m", __spec__.name, str(file)], capture_output=True, text=True)
    if done.returncode:
        raise RunError(f"bench recompute: a process failed: {done.stderr.strip().splitlines()[-1]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def worker(job: dict[str, Any]) -> dict[str, Any]:
    """One rank: a warm-up step, then `steps` timed ones."""
    torch.set_num_threads(1)
    launch.initialise(torch.device("cpu"), 600)
    job, device = DEFAULTS | job, torch.device("cpu")
    source, shape = model_of(job)
    config = plan_config(job, {"name": "this", **job}, 2)
    trainer = plan_trainer(job, config, shape, source, Mesh.create(layout_for(config, shape, 2), device))
    seconds = []
    for step in range(job["steps"] + 1):
        begin = time.perf_counter()
        trainer.train_step()
        if step:
            seconds.append(time.perf_counter() - begin)
    status = Path("/proc/self/status").read_text()
    peak = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    return {"peak_bytes": trainer.mesh.world.all_gather_object(peak), "step_seconds": seconds}


if __name__ == "__main__":
    given = json.loads(Path(sys.argv[1]).read_text())
    if launch.world_size() == 1:
        print(json.dumps(main(given)))
    else:
        result = worker(given)
        if launch.world_rank() == 0:
            print(json.dumps(result))
        launch.shut_down()
