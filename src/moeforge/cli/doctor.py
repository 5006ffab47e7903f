"""`moeforge doctor`: what this machine can do, and what would make it do more."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from typing import TYPE_CHECKING, Any

from moeforge import __version__
from moeforge.cli.output import Json, emit

if TYPE_CHECKING:
    from rich.table import Table

# distribution -> the extra that installs it
OPTIONAL = {
    "matplotlib": "report",
    "fastapi": "serve",
    "uvicorn": "serve",
    "prometheus-client": "serve",
    "llguidance": "serve",
}
PACKAGES = ("transformers", "safetensors", "gguf", "datasets", "numpy")
CPU_FEATURES = ("avx2", "avx512_f", "avx512_bf16", "amx_tile", "amx_bf16")


def command(json: Json = False) -> None:
    """Show the machine: Python, torch, processors, GPUs, memory, disk, optional packages."""
    result = examine()
    emit(result, json, lambda: _table(result))


def examine() -> dict[str, Any]:
    """Facts about this machine; `notes` says what is missing and what it would bring."""
    import torch

    from moeforge.kernels import native

    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # not in torch 2.11
    gpus = [_gpu(i) for i in range(torch.cuda.device_count())]
    optional = {name: _version(name) for name in OPTIONAL}
    notes = []
    for extra in dict.fromkeys(OPTIONAL.values()):
        missing = [name for name, version in optional.items() if version is None and OPTIONAL[name] == extra]
        if missing:
            notes.append(f"not installed: {', '.join(missing)}; pip install 'moeforge[{extra}]'")
    if native.name() is None:
        if os.environ.get("MOEFORGE_NATIVE") == "0":
            reason = "is off (MOEFORGE_NATIVE=0)"
        elif native.built() is None:
            reason = "was not built: install g++ (10 or later), then moeforge again"
        else:
            reason = "is of another version or for another machine: install moeforge again"
        notes.append(f"the native CPU library {reason}; without it CPUs serve more slowly")
    if not gpus:
        notes.append("no CUDA device: everything runs on the CPU")
        if not capabilities.get("avx512_bf16") and not capabilities.get("amx_bf16"):
            notes.append("this CPU has no bf16 arithmetic: model.precision = 'fp32' is likely faster")
    return {
        "moeforge": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "nccl": torch.distributed.is_available() and torch.distributed.is_nccl_available(),
        "gpus": gpus,
        "cpu": capabilities.get("cpu_name") or platform.processor(),
        "cpu_cores": len(os.sched_getaffinity(0)),
        "cpu_features": {feature: bool(capabilities.get(feature)) for feature in CPU_FEATURES},
        "torch_threads": torch.get_num_threads(),
        "native_kernels": native.name(),
        **_memory(),
        "disk_free_bytes": shutil.disk_usage(".").free,
        "packages": {name: _version(name) for name in PACKAGES},
        "optional_packages": optional,
        "notes": notes,
    }


def _gpu(index: int) -> dict[str, Any]:
    import torch

    device = torch.cuda.get_device_properties(index)
    capability = f"{device.major}.{device.minor}"
    return {"name": device.name, "memory_bytes": device.total_memory, "compute_capability": capability}


def _memory() -> dict[str, int]:
    """Total and available memory in bytes, from /proc/meminfo (which counts in KiB)."""
    with open("/proc/meminfo") as lines:
        kibibytes = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    return {
        "memory_bytes": kibibytes["MemTotal"] * 1024,
        "memory_available_bytes": kibibytes["MemAvailable"] * 1024,
    }


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _table(result: dict[str, Any]) -> Table:
    from rich.table import Table

    gpus = (f"{gpu['name']}, {_gib(gpu['memory_bytes'])}" for gpu in result["gpus"])
    packages = {**result["packages"], **result["optional_packages"]}
    rows = {
        "moeforge": result["moeforge"],
        "python": f"{result['python']} on {result['platform']}",
        "torch": f"{result['torch']} (CUDA {result['cuda'] or 'not built in'})",
        "GPUs": "\n".join(gpus) or "none",
        "CPU": f"{result['cpu']}, {result['cpu_cores']} cores, {result['torch_threads']} torch threads",
        "CPU features": ", ".join(name for name, there in result["cpu_features"].items() if there) or "none",
        "CPU library": result["native_kernels"] or "none",
        "memory": f"{_gib(result['memory_bytes'])}, {_gib(result['memory_available_bytes'])} available",
        "disk here": f"{_gib(result['disk_free_bytes'])} free",
        "packages": ", ".join(f"{name} {version or '-'}" for name, version in packages.items()),
        "notes": "\n".join(result["notes"]) or "none",
    }
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, text in rows.items():
        table.add_row(name, text)
    return table


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:.1f} GiB"
