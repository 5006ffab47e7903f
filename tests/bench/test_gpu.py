"""The GPU benchmark: every stage on tiny shapes with torch alone, failures that end nothing, the script's limits."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moeforge.bench import gpu, gpu_decode, gpu_kernels
from moeforge.bench.gpu_block import _mixtral, _plain_routed
from moeforge.bench.gpu_decode import DecodeBench, memory, skywork
from moeforge.bench.gpu_layer import MIXTRAL, TINY, routing
from moeforge.bench.gpu_report import flat, merge, shown, table
from moeforge.bench.gpu_tests import run_files
from moeforge.config.presets import model_preset
from moeforge.kernels import expert_mlp_reference, expert_permutation
from moeforge.model import LocalDispatcher

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu.sh"
CPU = torch.device("cpu")
MISSING = (
    "pydantic", "typer", "rich", "fastapi", "datasets", "transformers", "safetensors", "numpy", "gguf", "tomli_w",
    "triton",
)  # fmt: skip
BARE = f"""
import sys
from importlib.machinery import PathFinder
class Bare(PathFinder):
    @classmethod
    def find_spec(cls, name, *rest):
        return None if name in {MISSING} else super().find_spec(name, *rest)
sys.meta_path[sys.meta_path.index(PathFinder)] = Bare
import torch
torch.set_num_threads(1)
from moeforge.bench import gpu
for stage in gpu.STAGES:
    gpu.main([stage, "--device", "cpu", "--out", f"{{sys.argv[1]}}/{{stage}}.json"])
gpu.main(["report", sys.argv[1], "--out", f"{{sys.argv[1]}}/all.json"])
"""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """On a busy machine, threads that wait for one another make such small work take seconds."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """The JSON and the table of all stages where only torch is installed."""
    folder = tmp_path_factory.mktemp("parts")
    done = subprocess.run(
        [sys.executable, "-c", BARE, str(folder)], cwd=ROOT, capture_output=True, text=True, timeout=170
    )
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "all.json").read_text()), done.stdout


def test_all_stages_run_with_torch_alone(bare: tuple[dict[str, Any], str]) -> None:
    merged, _ = bare
    assert [stage["stage"] for stage in merged["stages"]] == list(gpu.STAGES)
    cases = [case for stage in merged["stages"] for case in stage["cases"]]
    assert [case.get("error") for case in cases] == [None] * len(cases)
    assert all(stage["finished"] for stage in merged["stages"])
    by_name = {case["case"]: case for case in cases}
    assert by_name["tests"]["skipped"] == "no GPU"
    assert by_name["MoE block, tiny"]["transformers_skipped"].startswith("ModuleNotFoundError")
    assert set(by_name["routed experts, tiny"]["speedup_over"]) == {"fp8", "grouped_mm"}
    assert not by_name["routed experts, tiny"]["failed"]
    assert by_name["Skywork-MoE, all layers"]["96 sequences"]["step_ms"] > 0
    assert by_name["slice of Skywork-MoE"]["mfu"] > 0
    assert merged["machine"]["triton"] is None and merged["goals"] == []  # a CPU has none to reach


def test_the_table_has_every_number(bare: tuple[dict[str, Any], str]) -> None:
    merged, printed = bare
    assert printed.rstrip() == table(merged).rstrip()
    for stage in merged["stages"]:
        for case in stage["cases"]:
            assert all(name in printed and shown(value) in printed for name, value in flat(case))


def test_transformers_block_is_the_same_function() -> None:
    result = gpu.block(TINY, CPU)
    assert result["difference"] < 0.01 and result["failed"] == {}
    assert set(result["forward_backward_ms"]) == {"moeforge", "transformers"}
    assert result["routing_share"] > 0
    peer, _ = _mixtral(MIXTRAL)
    assert peer.experts.config._experts_implementation == "grouped_mm"
    assert sum(p.numel() for p in peer.experts.parameters()) * 2 * MIXTRAL.top_k * MIXTRAL.tokens == pytest.approx(
        MIXTRAL.flops * MIXTRAL.experts
    )


@pytest.mark.parametrize(("triton", "expected"), [(True, 1), (False, 32)])
def test_decoding_is_measured_as_it_is_served(triton: bool, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def permutation(chosen: torch.Tensor, experts: int, alignment: int) -> Any:
        asked.append(alignment)
        return expert_permutation(chosen, experts, alignment=alignment)

    monkeypatch.setattr(gpu_kernels, "use_triton", lambda x: triton)
    monkeypatch.setattr(gpu_kernels, "expert_permutation", permutation)
    assert gpu_kernels.decode_experts(TINY, CPU, (2,))["2 sequences"]["failed"] == {}
    assert asked == [expected]


def test_plain_routed_experts_are_the_reference() -> None:
    torch.manual_seed(0)
    w13, w2 = torch.randn(4, 96, 64).bfloat16(), torch.randn(4, 64, 48).bfloat16()
    x, (weights, chosen) = torch.randn(32, 64).bfloat16(), routing(TINY, 32, CPU)
    y = _plain_routed(x, weights, chosen, w13 / 8, w2 / 7)
    expected = LocalDispatcher().route(
        0, x, weights, chosen, None, 4, lambda rows, offsets: expert_mlp_reference(rows, w13 / 8, w2 / 7, offsets)
    )
    assert float((y - expected).norm() / expected.norm()) < 0.01


def test_a_failing_case_is_reported_and_the_next_one_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> dict[str, Any]:
        raise RuntimeError("out of something")

    def cases(device: torch.device) -> Iterator[gpu.Case]:
        yield "first", lambda: {"rate": 1.0}
        yield "second", fails
        written = json.loads((tmp_path / "kernels.json").read_text())
        assert not written["finished"] and len(written["cases"]) == 2  # what a stopped stage leaves
        yield "third", lambda: {"rate": 3.0}

    monkeypatch.setitem(gpu.STAGES, "kernels", cases)
    gpu.main(["kernels", "--device", "cpu", "--out", str(tmp_path / "kernels.json")])
    merged = merge(tmp_path, list(gpu.STAGES))
    stages = {stage["stage"]: stage for stage in merged["stages"]}
    first, second, third = stages["kernels"]["cases"]
    assert (first["rate"], third["rate"]) == (1.0, 3.0)
    assert second["error"].startswith("Traceback") and "RuntimeError: out of something" in table(merged)
    assert stages["kernels"]["finished"] and not stages["decode"]["finished"]
    assert "decode: stopped before its end" in table(merged)


def test_goals_take_the_worst_of_a_case(tmp_path: Path) -> None:
    def write(stage: str, cases: list[dict[str, Any]]) -> None:
        made = [{"seconds": 1.0, **case} for case in cases]
        found = {"stage": stage, "machine": {"gpu": "A GPU"}, "finished": True, "cases": made}
        (tmp_path / f"{stage}.json").write_text(json.dumps(found))

    shares = {"up forward": 0.95, "down forward": 0.9}
    write(
        "kernels",
        [
            {"case": "grouped matmuls, a", **{name: {"share_of_ceiling": share} for name, share in shares.items()}},
            {"case": "grouped matmuls, b", "up forward": {"share_of_ceiling": 0.7}},
            {"case": "routed experts, a", "speedup_over": {"grouped_mm": 1.2}},
            {"case": "MoE block, a", "routing_share": 0.04},
            {"case": "MoE block, b", "routing_share": 0.06, "speedup_over": {"transformers": None}},
        ],
    )
    write("decode", [{"case": "Skywork-MoE, some layers", "host_synchronisations": "none"}])
    met = {goal["what"]: (goal["worst"], goal["met"]) for goal in merge(tmp_path, ["kernels", "decode"])["goals"]}
    assert met["grouped matmuls, a: share of the dense rate"] == (0.9, True)
    assert met["grouped matmuls, b: share of the dense rate"] == (0.7, False)
    assert met["routed experts, a: over grouped_mm"] == (1.2, True)
    assert met["FP8 experts in decoding: share of a copy"] == (None, None)
    assert met["MoE block, b: over transformers'"] == (None, None)
    assert met["MoE block, a: share of routing"] == (0.04, True)
    assert met["MoE block, b: share of routing"] == (0.06, False)
    assert met["host synchronisations of a decode step"] == ("none", True)
    assert "not measured" in table(merge(tmp_path, ["kernels", "decode"]))


def test_memory_of_the_real_model() -> None:
    config = skywork(torch.device("cuda"))
    assert replace(config, quantization=None) == model_preset("skywork-moe")
    sizes = memory(config, fp8_cache=True)
    weights = sizes["layer"] * config.num_layers + sizes["ends"]
    assert weights == pytest.approx(config.parameters() / 1e9, rel=0.02)  # a byte each, the ends two
    assert memory(config, fp8_cache=False)["sequence_in_a_layer"] == 2 * sizes["sequence_in_a_layer"]


def test_the_floor_counts_what_a_step_reads() -> None:
    config = skywork(CPU)
    assert config.moe is not None
    bench = DecodeBench(config, 2, CPU, live=20)
    result = bench.measure(1, copied=1e9)
    experts = result["experts_used_per_layer"]
    assert experts == config.moe.top_k  # of one token
    read = bench.other_bytes + experts * config.num_layers * bench.expert_bytes + bench.page_bytes / 2
    assert result["read_gbytes"] == pytest.approx(read / 1e9)
    assert result["floor_ms"] == pytest.approx(1e3 * read / 1e9)
    each = 3 * config.hidden_size * config.moe.expert_size
    assert each < bench.expert_bytes < 1.01 * each + 4 * 3 * 6 * 4  # a byte a weight, and scales
    assert bench.page_bytes == 2 * 2 * 32 * 64 * config.num_layers * 2  # 20 positions take two pages


def test_too_little_memory_is_a_reason_not_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_decode, "_free", lambda device: 1e-6)
    assert "GB are free" in gpu_decode.all_layers(CPU)["skipped"]
    assert "GB are free" in gpu_decode.some_layers(CPU)["skipped"]


def test_files_of_tests_are_run_apart(tmp_path: Path) -> None:
    (tmp_path / "test_good.py").write_text(
        "import pytest\n@pytest.mark.cuda\ndef test_one(): pass\ndef test_other(): assert False\n"
    )
    (tmp_path / "test_bad.py").write_text("import pytest\n@pytest.mark.cuda\ndef test_one(): assert 1 == 2\n")
    (tmp_path / "test_none.py").write_text("def test_one(): pass\n")
    (tmp_path / "test_wants.py").write_text("import nowhere_to_be_found.here\n")
    (tmp_path / "test_wrong.py").write_text("import moeforge.nowhere_to_be_found\n")
    found = {name: result() for name, result in run_files(sorted(tmp_path.glob("*.py")), tmp_path, "cuda")}
    assert list(found) == ["test_bad.py", "test_good.py", "test_none.py", "test_wants.py", "test_wrong.py"]
    assert found["test_wants.py"] == {"skipped": "nowhere_to_be_found is not installed"}
    assert "ModuleNotFoundError" in found["test_wrong.py"]["error"]
    assert "assert 1 == 2" in found["test_bad.py"]["error"] and "1 failed" in found["test_bad.py"]["summary"]
    assert "1 passed" in found["test_good.py"]["summary"]
    assert found["test_none.py"] == {"skipped": "no cuda tests"}


FAKE = """#!/bin/sh
[ "$1" = - ] && exit 0
shift 2
echo "$@" >> "$LOG"
case $1 in
    kernels) sleep 30 ;;
    decode) exit 3 ;;
    report) ls "$2" >> "$LOG" ;;
    *) echo '{}' > "$5" ;;
esac
"""


def test_the_script_survives_stages_that_hang_or_fail(tmp_path: Path) -> None:
    fake, script, log = tmp_path / "python", tmp_path / "benchmarks" / "gpu.sh", tmp_path / "log"
    fake.write_text(FAKE)
    fake.chmod(0o755)
    script.parent.mkdir()
    script.write_text(re.sub(r"^stage kernels \d+", "stage kernels 1", SCRIPT.read_text(), flags=re.MULTILINE))
    here = tmp_path / "here"
    here.mkdir()
    environment = {**os.environ, "PYTHON": str(fake), "LOG": str(log)}
    done = subprocess.run(
        ["bash", str(script), "out.json"], env=environment, cwd=here, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "kernels: ended with exit code 124" in done.stderr and "decode: ended with exit code 3" in done.stderr
    lines = log.read_text().splitlines()
    assert [line.split()[0] for line in lines[:5]] == ["kernels", "decode", "train", "tests", "report"]
    assert lines[4].endswith(f"--out {here / 'out.json'}") and lines[5:] == ["tests.json", "train.json"]


def test_the_scripts_limits_add_up_to_less_than_nine_minutes() -> None:
    limits = re.findall(r"^stage (\w+) (\d+)$", SCRIPT.read_text(), re.MULTILINE)
    assert {name for name, _ in limits} == set(gpu.STAGES)
    assert sum(int(seconds) + 5 for _, seconds in limits) <= 9 * 60 - 20


def test_the_script_wants_a_gpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    done = subprocess.run(
        ["bash", str(SCRIPT)], env={**os.environ, "PYTHON": sys.executable}, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2 and "sees no GPU" in done.stderr and done.stdout == ""
