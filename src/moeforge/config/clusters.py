"""Clusters by name, as "192x8-a800" (nodes x devices), or from a TOML file that `moeforge bench calibrate` writes.

Rates are what large matmuls usually reach on these devices (about 80 % of the data sheet on A800, 70 % on H100), and
bandwidths what collectives reach; the data sheet's figures are beside them. They are assumptions until a calibration
replaces them, and none was fitted to a published training run.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from pathlib import Path

from pydantic import ValidationError

from moeforge.config.hardware import HardwareProfile, Link, MatmulRate
from moeforge.config.section import expanded, with_tuples
from moeforge.errors import UserError

_SIZES = (1e8, 1e9, 1e10, 1e11, 1e12)


def _rates(*tflops: float) -> tuple[MatmulRate, ...]:
    return tuple(MatmulRate(flops=size, tflops=rate) for size, rate in zip(_SIZES, tflops, strict=False))


DEVICES: dict[str, HardwareProfile] = {
    "a800": HardwareProfile(
        name="a800",
        devices_per_node=8,
        memory_gbytes=85.9,
        peak_tflops={"bf16": 312.0, "fp32": 19.5},
        matmul={"bf16": _rates(20.0, 80.0, 180.0, 235.0, 250.0), "fp32": _rates(8.0, 15.0, 18.0, 18.5, 18.5)},
        memory_gbytes_per_second=1600.0,
        unit_overhead_us=60.0,
        intra_node=Link(gbytes_per_second=160.0, latency_us=10.0),
        inter_node=Link(gbytes_per_second=11.0, latency_us=20.0),
        source="A800-80G HGX: 312 TFLOP/s, 2,039 GB/s, NVLink 400 GB/s both ways, 800 Gb/s RoCE a node (SKYWORK)",
    ),
    "h100": HardwareProfile(
        name="h100",
        devices_per_node=8,
        memory_gbytes=85.5,
        peak_tflops={"bf16": 989.0, "fp32": 67.0},
        matmul={"bf16": _rates(30.0, 150.0, 420.0, 620.0, 690.0), "fp32": _rates(20.0, 40.0, 50.0, 52.0, 52.0)},
        memory_gbytes_per_second=2800.0,
        unit_overhead_us=50.0,
        intra_node=Link(gbytes_per_second=360.0, latency_us=10.0),
        inter_node=Link(gbytes_per_second=45.0, latency_us=15.0),
        source="H100 SXM: 989 TFLOP/s, 3,350 GB/s, NVLink 900 GB/s both ways, 400 Gb/s InfiniBand a device",
    ),
    "h200": HardwareProfile(
        name="h200",
        devices_per_node=8,
        memory_gbytes=150.0,
        peak_tflops={"bf16": 989.0, "fp32": 67.0},
        matmul={"bf16": _rates(30.0, 150.0, 420.0, 640.0, 720.0), "fp32": _rates(20.0, 40.0, 50.0, 52.0, 52.0)},
        memory_gbytes_per_second=4000.0,
        unit_overhead_us=50.0,
        intra_node=Link(gbytes_per_second=360.0, latency_us=10.0),
        inter_node=Link(gbytes_per_second=45.0, latency_us=15.0),
        source="H200 SXM: 989 TFLOP/s, 4,800 GB/s, NVLink 900 GB/s both ways, 400 Gb/s InfiniBand a device",
    ),
    "gb200": HardwareProfile(
        name="gb200",
        devices_per_node=64,
        memory_gbytes=199.0,
        peak_tflops={"bf16": 2500.0, "fp32": 80.0},
        matmul={"bf16": _rates(40.0, 250.0, 900.0, 1500.0, 1750.0), "fp32": _rates(25.0, 50.0, 60.0, 62.0, 62.0)},
        memory_gbytes_per_second=6600.0,
        unit_overhead_us=50.0,
        intra_node=Link(gbytes_per_second=720.0, latency_us=10.0),
        inter_node=Link(gbytes_per_second=45.0, latency_us=15.0),
        source="GB200 NVL72, 64 of a rack used: 2,500 TFLOP/s, 8,000 GB/s, NVLink 1,800 GB/s both ways",
    ),
    "4090": HardwareProfile(
        name="4090",
        devices_per_node=8,
        memory_gbytes=25.394,
        peak_tflops={"bf16": 165.2, "fp32": 82.6},
        matmul={"bf16": _rates(25.0, 90.0, 140.0, 150.0, 150.0), "fp32": _rates(20.0, 45.0, 55.0, 55.0, 55.0)},
        memory_gbytes_per_second=857.0,
        unit_overhead_us=50.0,
        intra_node=Link(gbytes_per_second=12.0, latency_us=42.0),
        inter_node=Link(gbytes_per_second=1.4, latency_us=50.0),
        source="RTX 4090 server, PCIe 4, no peer-to-peer: 23.65 GiB, 165 TFLOP/s, 1,008 GB/s, 100 Gb/s Ethernet a node",
    ),
    "3090": HardwareProfile(
        name="3090",
        devices_per_node=8,
        memory_gbytes=25.437,
        peak_tflops={"bf16": 71.2, "fp32": 35.6},
        matmul={"bf16": _rates(15.0, 45.0, 60.0, 65.0, 65.0), "fp32": _rates(10.0, 20.0, 26.0, 26.0, 26.0)},
        memory_gbytes_per_second=796.0,
        unit_overhead_us=60.0,
        intra_node=Link(gbytes_per_second=12.0, latency_us=42.0),
        inter_node=Link(gbytes_per_second=1.4, latency_us=50.0),
        source="RTX 3090 server, PCIe 4, no NVLink bridges: 23.69 GiB, 71 TFLOP/s, 936 GB/s, 100 Gb/s Ethernet a node",
    ),
    "cpu": HardwareProfile(
        name="cpu",
        devices_per_node=2,
        memory_gbytes=12.0,
        peak_tflops={"bf16": 0.19, "fp32": 0.07, "fp64": 0.035},
        matmul={
            "bf16": _rates(0.10, 0.15, 0.18, 0.18, 0.18),
            "fp32": _rates(0.05, 0.06, 0.07, 0.07, 0.07),
            "fp64": _rates(0.025, 0.03, 0.035, 0.035, 0.035),
        },
        memory_gbytes_per_second=12.0,
        unit_overhead_us=200.0,
        intra_node=Link(gbytes_per_second=2.0, latency_us=300.0),
        inter_node=Link(gbytes_per_second=0.1, latency_us=500.0),
        source="one core of a 2-core EPYC (Zen 4) as a device, gloo between processes",
    ),
}
_NAME = re.compile(r"(\d+)x(\d+)-(.+)")


def load_hardware(name: str) -> HardwareProfile:
    """A cluster by name ("8x8-h100": nodes x devices a node - device) or the TOML file at this path.

    Raises UserError: an unknown name, with the nearest ones; a file that cannot be read, or with a key that is unknown,
    missing or not allowed.
    """
    path = expanded(name)
    if path.suffix == ".toml" or path.is_file():
        return _read(path)
    match = _NAME.fullmatch(name.strip().lower())
    if match is None or match[3] not in DEVICES:
        given = match[3] if match else name
        nearest = difflib.get_close_matches(given, DEVICES, 1, cutoff=0)[0]
        example = f"{match[1]}x{match[2]}-{nearest}" if match else f"1x8-{nearest}"
        raise UserError(
            f'cluster "{name}": unknown; did you mean {example}? It must be NODESxDEVICES-NAME with NAME one of '
            f"{', '.join(DEVICES)}, or a TOML file as moeforge bench calibrate writes it"
        )
    nodes, devices = int(match[1]), int(match[2])
    if not nodes * devices:
        raise UserError(f'cluster "{name}": must have at least one node and one device a node')
    return DEVICES[match[3]].model_copy(update={"name": name, "nodes": nodes, "devices_per_node": devices})


def _read(path: Path) -> HardwareProfile:
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot read the hardware profile ({error.strerror})") from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"{path}: not valid TOML ({error})") from error
    try:
        return HardwareProfile.model_validate(with_tuples(data))
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        key = ".".join(map(str, problem["loc"]))
        if problem["type"] == "missing":
            raise UserError(f"{path}: {key}: missing") from error
        if problem["type"] == "extra_forbidden" and len(problem["loc"]) > 1:
            raise UserError(f"{path}: {key}: unknown key") from error
        if problem["type"] == "extra_forbidden":
            fields = HardwareProfile.model_fields
            nearest = difflib.get_close_matches(key, fields, 1, cutoff=0)[0]
            raise UserError(f"{path}: {key}: unknown key; did you mean {nearest}?") from error
        if problem["type"] == "check":
            raise UserError(f"{path}: {key + '.' if key else ''}{problem['msg']}") from error
        message = problem["msg"].removeprefix("Input should be ")
        raise UserError(f"{path}: {key} = {problem['input']!r}: must be {message}") from error
