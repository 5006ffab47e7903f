"""Measures this machine and makes a `HardwareProfile` of it.

Every measurement runs in processes of its own under torchrun, on as many devices at once as training would use: cores
share caches and memory, and so do GPUs their links.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tomli_w
import torch

from moeforge.bench import machine
from moeforge.bench.machine import Sizes, threads_of
from moeforge.checkpoint import pick_device
from moeforge.config.hardware import HardwareProfile, layer_fingerprint
from moeforge.config.model import ModelConfig
from moeforge.errors import RunError, UserError
from moeforge.train.optimizer import MODEL_DTYPE

Note = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class ModelCase:
    """A model whose units are timed, at one micro-batch."""

    config: ModelConfig
    precision: str
    sequence_length: int
    micro_batch_sequences: int

    def check(self) -> None:
        """Raises UserError for what cannot be trained."""
        if self.precision not in MODEL_DTYPE:
            raise UserError(f"--precision {self.precision}: must be one of {', '.join(MODEL_DTYPE)}")
        limit = self.config.max_positions
        if not 2 <= self.sequence_length <= limit:
            raise UserError(f"--sequence-length {self.sequence_length}: must be 2 to {limit}, the model's limit")


def calibrate(
    name: str,
    processes: int | None = None,
    case: ModelCase | None = None,
    sizes: Sizes | None = None,
    note: Note = lambda _: None,
) -> HardwareProfile:
    """The profile of this machine as one node of `processes` devices (None: all its GPUs, or one CPU).

    On a CPU a device is a process with its share of the cores and of the memory. Raises UserError for more processes
    than there are GPUs or cores, RunError where a measurement fails.
    """
    sizes = sizes or Sizes()
    device = pick_device("auto")
    gpu = device.type == "cuda"
    most = torch.cuda.device_count() if gpu else os.cpu_count() or 1
    devices = processes if processes is not None else most if gpu else 1
    if not 1 <= devices <= most:
        raise UserError(f"--processes {devices}: must be 1 to {most}, the number of {'GPUs' if gpu else 'cores'}")
    if case is not None:
        case.check()
    job = {"device": device.type, "sizes": dataclasses.asdict(sizes)}
    note(f"rates of {devices} {'GPUs' if gpu else 'processes'} at once")
    found = _run("rates", job, devices)
    # Where there is only one GPU, NCCL has nobody to talk to: two processes measure the host's way.
    link_device = "cuda" if most > 1 and gpu else "cpu"
    note("the link between two of them" if devices > 1 else "the link between two processes")
    found |= _run("link", job | {"device": link_device}, max(2, devices))
    peaks = {dtype: max(rate["tflops"] for rate in rates) for dtype, rates in found["matmul"].items()}
    measured = []
    if case is not None:
        note("the units of the model")
        given = dataclasses.asdict(case) | {"config": case.config.to_dict()}
        measured = [_measured_model(case, _run("units", job | {"case": given}, devices)["units"])]
    return HardwareProfile.model_validate_json(
        json.dumps(
            {
                "name": name,
                "devices_per_node": devices,
                "memory_gbytes": found["memory_bytes"] / 1e9,
                "peak_tflops": peaks,
                "matmul": found["matmul"],
                "memory_gbytes_per_second": found["memory_gbytes_per_second"],
                "unit_overhead_us": found["unit_overhead_us"],
                "intra_node": found["link"],
                "inter_node": found["link"],
                "source": _source(devices, gpu, link_device),
                "measured": measured,
            }
        )
    )


def profile_toml(profile: HardwareProfile) -> str:
    """The file that such a profile is read from."""
    return tomli_w.dumps(profile.model_dump(exclude_none=True))


def _source(devices: int, gpu: bool, link_device: str) -> str:
    what = torch.cuda.get_device_name() if gpu else f"CPU ({platform.machine()}), threads: {threads_of(devices)}"
    way = "nccl" if link_device == "cuda" else "gloo"
    return (
        f"moeforge bench calibrate, torch {torch.__version__}: {devices} x {what}, all at once. peak_tflops is the "
        f"best matmul rate measured, not a data sheet's; both links are {way} between processes of this machine"
    )


def _measured_model(case: ModelCase, units: dict[str, dict[str, float]]) -> dict[str, Any]:
    return {
        "fingerprint": layer_fingerprint(case.config),
        "precision": case.precision,
        "micro_batch_sequences": case.micro_batch_sequences,
        "sequence_length": case.sequence_length,
        "units": [{"kind": kind, **times} for kind, times in units.items()],
    }


def _run(what: str, job: dict[str, Any], processes: int) -> dict[str, Any]:
    """A measurement in fresh processes; what the first of them found."""
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "job.json"
        file.write_text(json.dumps({"what": what, **job}))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        done = subprocess.run([*command, "-m", machine.__spec__.name, str(file)], capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        # torchrun's own report comes after the traceback, whose last line says what happened.
        last = next((line for line in lines if "Error: " in line and "ChildFailedError" not in line), lines[-1])
        raise RunError(f"bench calibrate: measuring the {what} failed: {last.rpartition(']:')[2]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found
