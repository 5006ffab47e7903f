"""What `benchmarks/gpu.sh` runs: one stage a process, on a machine with torch and triton and little else.

    python -m moeforge.bench.gpu STAGE --out FILE [--device cpu]        STAGE: tests, kernels, decode, train
    python -m moeforge.bench.gpu report FOLDER --out FILE               one JSON and one table of the stages' files

A case that fails is reported with its traceback, and the next one runs. The file is written anew after every case, so a
stage that is stopped at its time limit leaves what it has. `--device cpu`: tiny shapes, which only show that all runs.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from moeforge.bench.gpu_block import block, experts
from moeforge.bench.gpu_decode import all_layers, some_layers
from moeforge.bench.gpu_kernels import ROWS, decode_experts, grouped
from moeforge.bench.gpu_layer import MIXTRAL, QWEN, SKYWORK, TINY, ceilings
from moeforge.bench.gpu_report import merge, table
from moeforge.bench.gpu_tests import gpu_tests
from moeforge.bench.gpu_train import train
from moeforge.files import write_whole

Case = tuple[str, Callable[[], dict[str, Any]]]


def kernel_cases(device: torch.device, rows: Sequence[int] = ROWS) -> Iterator[Case]:
    """Every kernel benchmark by name; experts of decode steps of so many `rows`."""
    layers = (TINY,) if device.type == "cpu" else (SKYWORK, MIXTRAL, QWEN)
    yield "ceilings", partial(ceilings, device)
    yield "FP8 experts in decoding", partial(decode_experts, layers[0], device, rows)
    for layer in layers:
        yield f"grouped matmuls, {layer.name}", partial(grouped, layer, device, beside_triton=layer is layers[0])
    for layer in layers[:2]:
        yield f"MoE block, {layer.name}", partial(block, layer, device)
    for layer in layers:
        yield f"routed experts, {layer.name}", partial(experts, layer, device)


def decode_cases(device: torch.device) -> Iterator[Case]:
    """Decode steps of Skywork-MoE."""
    yield "Skywork-MoE, some layers", partial(some_layers, device)
    yield "Skywork-MoE, all layers", partial(all_layers, device)


def train_cases(device: torch.device) -> Iterator[Case]:
    """Training steps."""
    yield "slice of Skywork-MoE", partial(train, device)


STAGES: dict[str, Callable[[torch.device], Iterator[Case]]] = {
    "tests": gpu_tests,
    "kernels": kernel_cases,
    "decode": decode_cases,
    "train": train_cases,
}


def facts(device: torch.device) -> dict[str, Any]:
    """What the numbers were measured on."""
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _triton_version(),
        "cpus": os.cpu_count(),
        "device": str(device),
    }
    if device.type == "cuda":
        found |= {
            "gpu": torch.cuda.get_device_name(device),
            "capability": "{}.{}".format(*torch.cuda.get_device_capability(device)),
            "memory_gbytes": torch.cuda.get_device_properties(device).total_memory / 1e9,
            "cuda": torch.version.cuda,
        }
    return found


def _triton_version() -> str | None:
    if find_spec("triton") is None:
        return None
    import triton

    return str(triton.__version__)


def run_cases(cases: Iterator[Case], note: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """The result of each case, or its traceback as `error`."""
    for name, case in cases:
        gc.collect()  # what the last one made, before the next one looks how much memory is free
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        begin = time.perf_counter()
        result: dict[str, Any] = {"case": name}
        try:
            result |= case()
        except Exception:  # whatever it is, the next case may work
            result["error"] = traceback.format_exc()
        result["seconds"] = time.perf_counter() - begin
        note(f"{name}: {result['seconds']:.1f} s" + (" FAILED" if "error" in result else ""))
        yield result


def run_stage(stage: str, device: torch.device, out: Path) -> dict[str, Any]:
    """All cases of a stage, written to `out` after each of them."""
    result: dict[str, Any] = {"stage": stage, "machine": facts(device), "finished": False, "cases": []}
    write_whole(out, json.dumps(result))
    for case in run_cases(STAGES[stage](device), lambda line: print(line, file=sys.stderr, flush=True)):
        result["cases"].append(case)
        write_whole(out, json.dumps(result))
    result["finished"] = True
    write_whole(out, json.dumps(result))
    return result


def main(arguments: list[str]) -> None:
    """One stage, or the report of all."""
    parser = argparse.ArgumentParser(prog="python -m moeforge.bench.gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("stage", choices=[*STAGES, "report"])
    parser.add_argument("folder", type=Path, nargs="?", help="of report: where the stages' files lie")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    given = parser.parse_args(arguments)
    if given.stage != "report":
        run_stage(given.stage, torch.device("cuda:0" if given.device == "cuda" else "cpu"), given.out)
        return
    if given.folder is None:
        parser.error("report: name the folder of the stages' files")
    merged = merge(given.folder, list(STAGES))
    print(table(merged))
    write_whole(given.out, json.dumps(merged, indent=2) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
