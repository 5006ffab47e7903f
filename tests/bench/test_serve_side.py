from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from moeforge.bench import serve_side
from moeforge.bench.serve_busy import Foreign, busy_seconds, session_seconds
from moeforge.bench.serve_side import WorkerSide, Workload
from moeforge.errors import RunError

WORKER = """
import json, os, sys, time
job = json.loads(sys.argv[1])
sys.stderr.write("loading\\n")
if job["side"] == "broken":
    sys.exit("no such weights")
print(json.dumps({"about": {"version": "7", "set": os.environ.get("SETTING")}}), flush=True)
for line in sys.stdin:
    command = json.loads(line)
    if command["mode"] == "dies":
        sys.exit("Killed: too much memory")
    if command["mode"] == "refuses":
        print(json.dumps({"error": "ValueError: too long"}), flush=True)
        continue
    while time.process_time() < command["max_tokens"] / 100:
        pass
    print(json.dumps({"seconds": 0.5, "first_tokens": [p[0] for p in command["prompts"]]}), flush=True)
"""
WORKLOAD = Workload("2", 2, 3, 30)


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], WorkerSide]:
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    monkeypatch.setattr(serve_side.serve_worker, "__file__", str(script))
    return lambda name: WorkerSide(sys.executable, {"side": name}, ("a", "b"), {"SETTING": "5"})


def test_a_process_answers_run_after_run(start: Callable[[str], WorkerSide]) -> None:
    side = start("hf")
    assert side.about == {"version": "7", "set": "5"} and side.modes(WORKLOAD) == ("a", "b")
    for seed in (1, 2):
        prompts = WORKLOAD.prompts(10, seed)
        run = side.run(WORKLOAD, prompts, "a")
        assert run["seconds"] == 0.5 and run["first_tokens"] == [prompt[0] for prompt in prompts]
        assert run["foreign_share"] is None or 0 <= run["foreign_share"] <= 1
    side.close()
    assert side._process.returncode == 0


def test_faults_name_the_side(start: Callable[[str], WorkerSide]) -> None:
    with pytest.raises(RunError, match="the process of broken failed: no such weights"):
        start("broken")
    side = start("hf")
    with pytest.raises(RunError, match="hf: ValueError: too long"):
        side.run(WORKLOAD, [[1], [2]], "refuses")
    assert side.run(WORKLOAD, [[1], [2]], "a")["seconds"] == 0.5  # it goes on
    with pytest.raises(RunError, match="the process of hf failed: Killed: too much memory"):
        side.run(WORKLOAD, [[1], [2]], "dies")
    with pytest.raises(RunError, match="the process of hf failed"):
        side.run(WORKLOAD, [[1], [2]], "a")
    side.close()
    side.close()


@pytest.mark.skipif(busy_seconds() is None, reason="the system does not tell")
def test_a_sides_own_time_is_not_foreign(start: Callable[[str], WorkerSide]) -> None:
    side = start("hf")
    foreign = Foreign(lambda: 0.0)
    own = session_seconds(side._process.pid)
    run = side.run(WORKLOAD, [[1], [2]], "a")  # computes for 0.3 s
    used = session_seconds(side._process.pid) - own
    assert 0.15 < used < 0.6
    everything = foreign.share()
    assert everything is not None and run["foreign_share"] < everything
    side.close()
    assert session_seconds(side._process.pid) == 0
