"""Calibration of this machine: a profile that is complete, and that reads back as it was."""

from __future__ import annotations

import dataclasses
import json
import os
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moeforge.bench import calibrate as room
from moeforge.bench import machine
from moeforge.bench.calibrate import ModelCase, calibrate, profile_toml
from moeforge.bench.machine import Sizes
from moeforge.cli.app import main
from moeforge.config.hardware import HardwareProfile, layer_fingerprint
from moeforge.config.model import ModelConfig, MoEConfig
from moeforge.errors import RunError, UserError

RunRanks = Callable[..., list[Any]]
SHAPE = ModelConfig(
    vocab_size=64, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, ffn_size=48,
    max_positions=64, moe=MoEConfig(num_experts=4, top_k=2, expert_size=48),
)  # fmt: skip
SMALL = Sizes(matmul_seconds=1e-4, copy_bytes=2**20, message_bytes=2**16, repeats=2)
CASE = ModelCase(SHAPE, "bf16", 16, 2)


def _measure(rank: int, job: dict[str, Any]) -> dict[str, Any]:
    machine.threads_of = lambda _: 1
    return machine.main(job)


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch, run_ranks: RunRanks) -> None:
    """Measurements in forked processes: torchrun's take seconds to start."""
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(
        room, "_run", lambda what, job, processes: run_ranks(processes, _measure, {"what": what, **job})[0]
    )


def check(profile: HardwareProfile, processes: int) -> None:
    assert profile.devices_per_node == profile.devices == processes
    assert profile.memory_gbytes > 0 and profile.memory_gbytes_per_second > 0 and profile.unit_overhead_us > 0
    assert set(profile.matmul) == set(profile.peak_tflops) == {"bf16", "fp32", "fp64"}
    for precision, rates in profile.matmul.items():
        assert rates[0].flops == 2 * 64**3 and all(rate.tflops > 0 for rate in rates)
        assert profile.peak_tflops[precision] == max(rate.tflops for rate in rates)
    for link in (profile.intra_node, profile.inter_node):
        assert link.gbytes_per_second > 0 and link.latency_us > 0
    assert "best matmul rate" in profile.source
    (model,) = profile.measured
    assert (model.fingerprint, model.precision) == (layer_fingerprint(SHAPE), "bf16")
    assert (model.micro_batch_sequences, model.sequence_length) == (2, 16)
    assert [unit.kind for unit in model.units] == ["embed", "attention", "experts", "head"]
    for unit in model.units:
        assert min(unit.forward, unit.backward, unit.backward_weight, unit.update) > 0
    read = tomllib.loads(profile_toml(profile))
    assert HardwareProfile.model_validate_json(json.dumps(read)) == profile


def test_profile(forked: None) -> None:
    notes: list[str] = []
    check(calibrate("here", 2, CASE, SMALL, notes.append), 2)
    assert len(notes) == 3


@pytest.mark.slow
def test_profile_of_one_process_under_torchrun() -> None:
    check(calibrate("here", None, CASE, SMALL), 1)


@pytest.mark.slow
def test_what_failed_is_said() -> None:
    job = {"device": "cpu", "sizes": {"copy_bytes": 0, "unheard_of": 1}}
    with pytest.raises(RunError, match="measuring the rates failed: .*unheard_of"):
        room._run("rates", job, 1)


def test_models_that_differ_in_layers_share_their_measurements() -> None:
    assert layer_fingerprint(SHAPE) == layer_fingerprint(dataclasses.replace(SHAPE, num_layers=5))
    assert layer_fingerprint(SHAPE) != layer_fingerprint(dataclasses.replace(SHAPE, ffn_size=64))


@pytest.mark.parametrize(
    ("processes", "case", "line"),
    [
        (3, CASE, "--processes 3: must be 1 to 2, the number of cores"),
        (0, CASE, "--processes 0: must be 1 to 2"),
        (1, dataclasses.replace(CASE, precision="fp8"), "--precision fp8: must be one of bf16, bf16_pure, fp32, fp64"),
        (1, dataclasses.replace(CASE, sequence_length=65), "--sequence-length 65: must be 2 to 64"),
    ],
)
def test_bad_input(processes: int, case: ModelCase, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    with pytest.raises(UserError, match=line):
        calibrate("here", processes, case, SMALL)


def test_verb(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    given: dict[str, Any] = {}
    link = {"gbytes_per_second": 1.0, "latency_us": 9.0}
    figures = {
        "name": "m", "memory_gbytes": 4.0, "peak_tflops": {"bf16": 0.1}, "memory_gbytes_per_second": 10.0,
        "matmul": {"bf16": [{"flops": 1e6, "tflops": 0.1}]}, "intra_node": link, "inter_node": link,
    }  # fmt: skip
    profile = HardwareProfile.model_validate_json(json.dumps(figures))

    def measured(name: str, processes: int | None, case: ModelCase | None, note: Any) -> HardwareProfile:
        given.update(name=name, processes=processes, case=case)
        return profile

    monkeypatch.setattr(room, "calibrate", measured)
    out = tmp_path / "new" / "box.toml"
    arguments = ["bench", "calibrate", "--out", str(out), "--model", "smollm2-135m", "--sequence-length", "256"]
    assert main([*arguments, "--processes", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["peak_tflops"] == {"bf16": 0.1}
    assert HardwareProfile.model_validate_json(json.dumps(tomllib.loads(out.read_text()))) == profile
    assert (given["name"], given["processes"]) == ("box", 2)
    assert given["case"].sequence_length == 256 and given["case"].config.hidden_size == 576
    assert main(arguments) == 0 and f"written to {out}" in capsys.readouterr().out
