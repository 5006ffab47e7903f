"""Clusters by name and from files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tomli_w

from moeforge.config.clusters import DEVICES, load_hardware
from moeforge.config.hardware import HardwareProfile
from moeforge.errors import UserError


def table(**changes: Any) -> dict[str, Any]:
    """A profile as calibration writes it; a change of None leaves the key out."""
    data = {
        "name": "here", "nodes": 2, "devices_per_node": 4, "memory_gbytes": 80, "usable_memory": 0.9,
        "peak_tflops": {"bf16": 100.0},
        "matmul": {"bf16": [{"flops": 1e8, "tflops": 10.0}, {"flops": 1e10, "tflops": 80.0}]},
        "memory_gbytes_per_second": 1000.0,
        "intra_node": {"gbytes_per_second": 100.0, "latency_us": 5.0},
        "inter_node": {"gbytes_per_second": 10.0, "latency_us": 20.0},
    }  # fmt: skip
    return {key: value for key, value in (data | changes).items() if value is not None}


def written(directory: Path, data: dict[str, Any]) -> str:
    path = directory / "cluster.toml"
    path.write_text(tomli_w.dumps(data))
    return str(path)


@pytest.mark.parametrize("device", DEVICES)
def test_every_device_by_name(device: str) -> None:
    found = load_hardware(f"3x5-{device}")
    assert (found.name, found.nodes, found.devices_per_node, found.devices) == (f"3x5-{device}", 3, 5, 15)
    assert found.matmul == DEVICES[device].matmul and found.memory_gbytes == DEVICES[device].memory_gbytes
    for precision, rates in found.matmul.items():
        reached = [rate.tflops for rate in rates]
        assert reached == sorted(reached) and reached[-1] <= found.peak_tflops[precision]
    assert found.source and found.usable_bytes == found.memory_gbytes * 1e9 * 0.92


def test_the_flagship_and_case() -> None:
    assert load_hardware("192x8-a800").devices == 1536
    assert load_hardware(" 1X8-H100 ").peak_tflops["bf16"] == 989.0


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("8x8-h1000", "8x8-h100"), ("192x8-a80", "192x8-a800"), ("h200", "1x8-h200"), ("8x-h100", "1x8-"), ("", "1x8-")],
)
def test_unknown_names_say_what_is_near(name: str, nearest: str) -> None:
    with pytest.raises(UserError, match=f'^cluster "{name}": unknown; did you mean {nearest}') as found:
        load_hardware(name)
    assert all(device in str(found.value) for device in DEVICES)


@pytest.mark.parametrize("name", ["0x8-h100", "8x0-h100"])
def test_a_cluster_has_devices(name: str) -> None:
    with pytest.raises(UserError, match="must have at least one node and one device a node"):
        load_hardware(name)


@pytest.mark.parametrize("device", DEVICES)
def test_round_trip_through_toml(device: str, tmp_path: Path) -> None:
    profile = load_hardware(f"2x4-{device}")
    path = written(tmp_path, profile.model_dump(mode="json", exclude_none=True))
    assert load_hardware(path) == profile and hash(load_hardware(path)) == hash(profile)


def test_a_file_with_measured_units(tmp_path: Path) -> None:
    times = dict.fromkeys(("forward", "backward", "backward_input", "backward_weight", "recompute", "update"), 0.5)
    model = {
        "fingerprint": "abc", "precision": "bf16", "micro_batch_sequences": 1, "sequence_length": 64,
        "units": [{"kind": "experts", **times}],
    }  # fmt: skip
    found = load_hardware(written(tmp_path, table(measured=[model])))
    assert found.measured[0].units[0].kind == "experts" and found.measured[0].units[0].forward == 0.5
    assert HardwareProfile.model_validate(found.model_dump()) == found


LINK = {"gbytes_per_second": 100.0, "latency_us": 5.0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"memory_gbytes": -1.0}, "memory_gbytes = -1.0: must be greater than 0"),
        ({"memory_gbytes": None}, "memory_gbytes: missing"),
        ({"memory_gbytes": float("inf")}, "memory_gbytes = inf: must be a finite number"),
        ({"nodes": 0}, "nodes = 0: must be greater than or equal to 1"),
        ({"nodes": 1.5}, "nodes = 1.5: must be a valid integer"),
        ({"usable_memory": 0.0}, "usable_memory = 0.0: must be greater than 0"),
        ({"usable_memory": 92}, "usable_memory = 92: must be less than or equal to 1"),
        ({"intra_node": None}, "intra_node: missing"),
        ({"intra_node": {"gbytes_per_second": 1.0}}, "intra_node.latency_us: missing"),
        ({"intra_node": LINK | {"latency_us": -5.0}}, "intra_node.latency_us = -5.0: must be greater than or equal to"),
        ({"inter_node": LINK | {"gbytes_per_second": 0}}, "inter_node.gbytes_per_second = 0: must be greater than 0"),
        ({"memory_gbyte": 80.0}, "memory_gbyte: unknown key; did you mean memory_gbytes?"),
        ({"matmul": {"bf16": []}}, "matmul.bf16 = []: must have at least one size"),
        (
            {"matmul": {"bf16": [{"flops": 1e9, "tflops": 1.0}, {"flops": 1e8, "tflops": 2.0}]}},
            "matmul.bf16 = [1000000000.0, 100000000.0]: sizes must ascend",
        ),
        ({"matmul": {"fp32": [{"flops": 1e9, "tflops": 1.0}]}}, "peak_tflops.fp32 = missing: must be given"),
        ({"matmul": {"fp8": [{"flops": 1e9, "tflops": 1.0}]}}, "'bf16', 'fp32' or 'fp64'"),
        ({"name": ""}, "name = '': "),
    ],
)
def test_what_a_file_may_not_say(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = written(tmp_path, table(**changes))
    with pytest.raises(UserError) as found:
        load_hardware(path)
    assert str(found.value).startswith(f"{path}: ") and message in str(found.value)
    assert "\n" not in str(found.value) and found.value.exit_code == 2


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere.toml: cannot read the hardware profile \(No such file"):
        load_hardware(str(tmp_path / "nowhere.toml"))
    path = tmp_path / "broken.toml"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="not valid TOML"):
        load_hardware(str(path))
    path.write_text("name = ")
    with pytest.raises(UserError, match="not valid TOML"):
        load_hardware(str(path))
