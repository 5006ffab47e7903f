"""A disk that fills up: one line, exit code 1, nothing half-written, and all that was there before still is.

A file-size limit stands for the full disk where no small disk can be mounted.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from moeforge.checkpoint import open_checkpoint
from moeforge.cli.app import main

Model = Callable[..., Path]
Fails = Callable[..., str]
PAGE = 4096


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def fails(capfd: pytest.CaptureFixture[str]) -> Fails:
    """Runs a command line that must meet the full disk; returns its last line."""

    def run(arguments: list[str], file_bytes: int | None = None) -> str:
        capfd.readouterr()
        with files_of_at_most(resource.RLIM_INFINITY if file_bytes is None else file_bytes):
            code = main([*arguments, "--json"])
        out, err = capfd.readouterr()
        assert (code, out) == (1, ""), err
        last = err.splitlines()[-1]
        assert last.startswith("moeforge: error: ") and "unexpected" not in err and "Traceback" not in err, err
        return last

    return run


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """`small_disk(bytes)`: a directory on a disk of this size of its own."""
    mounted: list[Path] = []

    def mount(size: int) -> Path:
        place = tmp_path / f"disk{len(mounted)}"
        place.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)], capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(f"a tmpfs cannot be mounted here: {done.stderr.strip()}")
        mounted.append(place)
        return place

    yield mount
    for place in mounted:
        subprocess.run(["umount", "-l", str(place)], check=True)


def names(directory: Path) -> list[str]:
    """What lies there, but for the lock that keeps other processes out of a run."""
    return sorted(path.name for path in directory.iterdir() if path.name != ".lock")


def losses(run: Path) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def test_upcycle(tmp_path: Path, model: Model, command: Callable[..., list[str]], fails: Fails) -> None:
    arguments = command("upcycle", model())
    line = fails(arguments, file_bytes=100_000)
    assert "the disk is full" in line and "free space and run again to go on" in line
    assert not (tmp_path / "out").exists()
    assert main(arguments) == 0
    assert open_checkpoint(tmp_path / "out").config.moe is not None
    assert not (tmp_path / ".out.partial").exists()


def test_upcycle_checks_the_disk_first(model: Model, small_disk: Callable[[int], Path], fails: Fails) -> None:
    disk = small_disk(16 * PAGE)
    assert "nothing was written" in fails(["upcycle", str(model()), str(disk / "out"), "--experts", "4"])
    assert names(disk) == []


@pytest.fixture
def half_run(tmp_path: Path, model: Model, train_file: Callable[..., Path]) -> Path:
    """The training file of a run with a checkpoint at step 2 of 4 (as a kill in step 3 leaves it)."""
    file = train_file(model("moe"))
    assert main(["train", str(file)]) == 0
    run = tmp_path / "run"
    (tmp_path / "losses.json").write_text(json.dumps(losses(run)))
    for gone in (run / "checkpoints" / "step-00000004", run / "final"):
        for path in gone.iterdir():
            path.unlink()
        gone.rmdir()
    return file


@pytest.mark.parametrize("size", [100_000, 200_000])
def test_checkpoints(tmp_path: Path, half_run: Path, size: int, fails: Fails) -> None:
    run = tmp_path / "run"
    before = {path: path.read_bytes() for path in (run / "checkpoints").rglob("*") if path.is_file()}
    biggest = max(map(len, before.values()))
    assert size < biggest
    line = fails(["train", str(half_run)], file_bytes=size)
    assert "cannot save the checkpoint of step 4" in line and "the disk is full" in line
    assert "the last complete checkpoint is" in line and "step-00000002" in line
    assert {path: path.read_bytes() for path in (run / "checkpoints").rglob("*") if path.is_file()} == before
    assert not [name for name in names(run) if name.startswith(".") or name == "final"]
    assert main(["train", str(half_run)]) == 0
    assert losses(run) == json.loads((tmp_path / "losses.json").read_text())


def test_a_run_on_a_small_disk(
    model: Model, train_file: Callable[..., Path], small_disk: Callable[[int], Path], fails: Fails
) -> None:
    disk = small_disk(32 * PAGE)
    file = train_file(model("moe"), run={"dir": str(disk / "run")})
    line = fails(["train", str(file)])
    assert "cannot save the checkpoint of step 2" in line and "no checkpoint was saved before" in line
    assert names(disk / "run" / "checkpoints") == []
    assert 2 <= len(losses(disk / "run")) <= 4  # the save is under way while training goes on


def test_a_disk_without_any_room(
    model: Model, train_file: Callable[..., Path], small_disk: Callable[[int], Path], fails: Fails
) -> None:
    disk = small_disk(PAGE)
    (disk / "filler").write_bytes(b"x" * PAGE)
    line = fails(["train", str(train_file(model("moe"), run={"dir": str(disk / "run")}))])
    assert "config.toml: cannot be written (no space left on device)" in line
    assert not (disk / "run").exists()


@pytest.mark.parametrize("tensorboard", [pytest.param(False, marks=pytest.mark.slow), True])
def test_metrics(tmp_path: Path, tensorboard: bool, model: Model, train_file: Callable[..., Path]) -> None:
    run = {"dir": str(tmp_path / "run"), "tensorboard": tensorboard}
    file = train_file(model("moe"), run=run, train={"steps": 60}, checkpoint={"every": 0})
    command = [sys.executable, "-m", "moeforge", "train", str(file), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=lambda: files_limit(12_000))
    assert (done.returncode, done.stdout) == (1, "")
    last = done.stderr.splitlines()[-1]
    assert "cannot be written (file too large)" in last and "goes on from the last checkpoint" in last
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr
    assert str(tmp_path / "run") in last


def files_limit(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.parametrize("way", ["limit", "disk"])
def test_token_cache(
    tmp_path: Path, way: str, model: Model, train_file: Callable[..., Path], request: pytest.FixtureRequest,
    fails: Fails,
) -> None:  # fmt: skip
    cache = request.getfixturevalue("small_disk")(PAGE) / "cache" if way == "disk" else tmp_path / "cache"
    (tmp_path / "text.txt").write_text("w1 w2 w3 w4 " * 3000)
    file = train_file(model(), data={"cache_dir": str(cache)})
    line = fails(["train", str(file)], file_bytes=None if way == "disk" else 2000)
    assert str(cache) in line and "nothing of it was kept" in line
    assert [name for name in names(cache) if not name.endswith(".lock")] == []
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("way", ["limit", "disk"])
def test_reports(
    tmp_path: Path, way: str, model: Model, train_file: Callable[..., Path], request: pytest.FixtureRequest,
    fails: Fails,
) -> None:  # fmt: skip
    assert main(["train", str(train_file(model()))]) == 0
    place = request.getfixturevalue("small_disk")(PAGE) if way == "disk" else tmp_path
    (place / "report.html").write_text("of yesterday")
    before = names(place)
    arguments = ["report", str(tmp_path / "run"), "--out", str(place / "report.html")]
    line = fails(arguments, file_bytes=None if way == "disk" else 20_000)
    assert str(place / "report.html") in line
    assert names(place) == before
    assert (place / "report.html").read_text() == "of yesterday"
