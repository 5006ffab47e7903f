"""Training checkpoints: any layout reads what any other wrote, and what is not whole is not there."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moeforge.config.model import ModelConfig, MoEConfig
from moeforge.errors import RunError, UserError
from moeforge.layout import Layout, build_layout
from moeforge.model import Transformer
from moeforge.parallel import Mesh
from moeforge.parallel.parameters import StateEntry, chunk_of, parameter_parts
from moeforge.train import dcp
from moeforge.train.state import (
    Saver,
    TrainerState,
    checkpoint_directory,
    checkpoints,
    load_entries,
    load_trainer_state,
)

RunRanks = Callable[..., list[Any]]
CPU = torch.device("cpu")
CONFIG = ModelConfig(
    vocab_size=37, hidden_size=12, num_layers=4, num_heads=6, num_kv_heads=3, head_dim=4, ffn_size=20,
    tie_embeddings=True, qkv_bias=True, output_bias=True, qk_norm="full",
    moe=MoEConfig(5, 2, 7, gate_norm=1.0, gate_norm_learned=True, router_bias=True, layer_frequency=2),
)  # fmt: skip
MODEL = json.loads(json.dumps(CONFIG.to_dict()))
STATE = TrainerState(3, 12, 480, [0.1, 0.2], "data", {"model": {"precision": "fp32"}}, MODEL)
LAYOUTS: dict[str, dict[str, Any]] = {
    "one": {},
    "dp2": {"dp": 2},
    "tp3": {"tp": 3},
    "tp4, empty parts": {"tp": 4},
    "pp2 dp2": {"pp": 2, "dp": 2, "ep": 2},
    "pp3": {"pp": 3, "stages": [2.5, 0, 1.5]},
    "etp2 pp2": {"pp": 2, "tp": 2, "ep": 1, "etp": 2},
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def layout_of(name: str) -> Layout:
    return build_layout(CONFIG, **LAYOUTS[name])


def global_state() -> dict[str, Tensor]:
    """Every weight and both moments, by key."""
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        shapes = {name: weight.shape for name, weight in Transformer(CONFIG).state_dict().items()}
    keys = [f"{kind}.{name}" for kind in ("weight", "exp_avg", "exp_avg_sq") for name in shapes]
    return {key: torch.randn(shapes[key.split(".", 1)[1]], generator=generator) for key in keys}


def entries_of(mesh: Mesh, whole: dict[str, Tensor] | None, zero: bool = True) -> list[StateEntry]:
    """The state of a rank as an optimiser holds it; NaN where `whole` is None."""
    entries = []
    for stage in mesh.stages:
        for name, part in parameter_parts(CONFIG, mesh.layout, stage, mesh.at.tp, mesh.at.expert_rank).items():
            group = getattr(mesh, part.reduce)
            begin, end = chunk_of(part.numel, group.size, group.index) if zero else (0, part.numel)
            saved = (zero or group.index == 0) and not (part.tied and mesh.tied.index > 0)
            for kind in ("weight", "exp_avg", "exp_avg_sq"):
                found = torch.full((end - begin,), float("nan"))
                if whole is not None:
                    found = part.cut(whole[f"{kind}.{name}"]).flatten()[begin:end].clone()
                entries.append(StateEntry(f"{kind}.{name}", part, begin, end, found, saved))
    return entries


def save_as(rank: int, layout: str, run: Path, zero: bool = True) -> None:
    mesh, saver = Mesh.create(layout_of(layout), CPU), Saver()
    saver.save(run, entries_of(mesh, global_state(), zero), STATE, 2, mesh)
    saver.wait()


def load_as(rank: int, layout: str, directory: Path) -> bool:
    mesh = Mesh.create(layout_of(layout), CPU)
    found = entries_of(mesh, None)
    load_entries(directory, found, mesh)
    expected = entries_of(mesh, global_state())
    return all(torch.equal(a.tensor, b.tensor) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("layout", "zero"),
    [("one", True), ("tp3", True), ("tp3", False), ("pp2 dp2", True), ("pp3", True), ("etp2 pp2", False)],
)
def test_every_layout_finds_its_part(run_ranks: RunRanks, tmp_path: Path, layout: str, zero: bool) -> None:
    world = layout_of(layout).world_size
    run_ranks(world, save_as, layout, tmp_path, zero)
    (directory,) = checkpoints(tmp_path)
    assert load_trainer_state(directory) == STATE
    saved, expected = dcp.SavedState(directory), global_state()
    for key, tensor in expected.items():
        assert torch.equal(saved.tensor(key).view(tensor.shape), tensor), key
    for other in LAYOUTS if layout == "tp3" and zero else ("dp2", "tp4, empty parts"):
        assert all(run_ranks(layout_of(other).world_size, load_as, other, directory)), other


def single() -> tuple[Mesh, list[StateEntry]]:
    mesh = Mesh.single(layout_of("one"), CPU)
    return mesh, entries_of(mesh, global_state())


def test_what_changes_after_the_call_is_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mesh, entries = single()
    changed, write = threading.Event(), dcp.write
    monkeypatch.setattr(dcp, "write", lambda *given: changed.wait(10) and write(*given))
    saver = Saver()
    directory = saver.save(tmp_path, entries, STATE, 2, mesh)
    for entry in entries:
        entry.tensor.zero_()
    assert checkpoints(tmp_path) == []
    changed.set()
    saver.wait()
    assert directory == checkpoint_directory(tmp_path, STATE.step)
    load_entries(directory, entries, mesh)
    for entry, expected in zip(entries, entries_of(mesh, global_state()), strict=True):
        assert torch.equal(entry.tensor, expected.tensor)


def test_the_newest_are_kept_and_drafts_go(tmp_path: Path) -> None:
    mesh, entries = single()
    draft = tmp_path / "checkpoints" / ".step-00000007.saving"
    draft.mkdir(parents=True)
    (draft / "__0_0.distcp").write_bytes(b"half")
    saver = Saver()
    for step in (1, 2, 3, 3, 4):
        saver.save(tmp_path, entries, replace(STATE, step=step), 2, mesh)
    saver.wait()
    saver.wait()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000003", "step-00000004"]
    assert load_trainer_state(checkpoints(tmp_path)[-1]).step == 4


@pytest.mark.parametrize("where", ["write", "write_metadata"])
def test_a_full_disk_leaves_the_checkpoint_before(tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mesh, entries = single()
    saver = Saver()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(dcp, where, full)
        saver.save(tmp_path, entries, STATE, 2, mesh)
        deadline = time.monotonic() + 10
        while not saver.failed and time.monotonic() < deadline:
            time.sleep(0.01)
        assert saver.failed
        with pytest.raises(RunError, match="step 3 .the disk is full.*no checkpoint was saved before"):
            saver.wait()
    first = saver.save(tmp_path, entries, STATE, 2, mesh)
    saver.wait()
    assert not saver.failed
    with monkeypatch.context() as patch:
        patch.setattr(dcp, where, full)
        saver.save(tmp_path, entries, replace(STATE, step=4), 2, mesh)
        with pytest.raises(RunError, match=f"step 4 .the disk is full.*last complete checkpoint is {first}"):
            saver.save(tmp_path, entries, replace(STATE, step=5), 2, mesh)
    assert [path.name for path in first.parent.iterdir()] == [first.name]
    load_entries(first, entries, mesh)


def test_a_place_where_nothing_can_be_written(tmp_path: Path) -> None:
    mesh, entries = single()
    (tmp_path / "checkpoints").write_text("in the way")
    with pytest.raises(RunError, match="cannot save the checkpoint of step 3"):
        Saver().save(tmp_path, entries, STATE, 2, mesh)


@pytest.mark.parametrize("content", [None, "", "{", "[]", "{}", '{"step": 3, "layout": 1}', b"\xff\xfe"])
def test_what_is_no_checkpoint(tmp_path: Path, content: str | bytes | None) -> None:
    if content is not None:
        (tmp_path / "trainer.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match="not a training checkpoint"):
        load_trainer_state(tmp_path)


def _failing(rank: int, run: Path, elsewhere: bool) -> list[str]:
    """A good save, one in which rank 1 fails, and a good one again; what was raised."""
    mesh, saver, raised = Mesh.create(layout_of("tp3"), CPU), Saver(), []
    entries, write = entries_of(mesh, global_state()), dcp.write

    def bad(directory: Path, *rest: Any) -> dcp.Written:
        if rank == 1 and elsewhere:  # as on a machine with a disk of its own
            return write(run / "elsewhere", *rest)
        if rank == 1:
            raise OSError(28, "No space left on device")
        return write(directory, *rest)

    for step in (1, 2, 3):
        dcp.write = bad if step == 2 else write
        saver.save(run, entries, replace(STATE, step=step), 5, mesh)
        try:
            saver.wait()
        except RunError as error:
            raised.append(str(error))
    return raised


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_rank_that_fails_fails_all(run_ranks: RunRanks, tmp_path: Path, elsewhere: bool) -> None:
    (first,), *others = run_ranks(3, _failing, tmp_path, elsewhere)
    assert all(other == [first] for other in others)
    assert ("on a disk that all of them share" if elsewhere else "rank 1: the disk is full") in first
    assert f"last complete checkpoint is {checkpoint_directory(tmp_path, 1)}" in first
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000001", "step-00000003"]


def _damaged(rank: int, directory: Path) -> str:
    mesh = Mesh.create(layout_of("dp2"), CPU)
    if rank == 0:
        (directory / "__1_0.distcp").unlink()
    mesh.world.barrier()
    with pytest.raises(UserError) as caught:
        load_entries(directory, entries_of(mesh, None), mesh)
    return str(caught.value)


def test_a_lost_file_is_named_on_all_ranks(run_ranks: RunRanks, tmp_path: Path) -> None:
    run_ranks(2, save_as, "dp2", tmp_path)
    (directory,) = checkpoints(tmp_path)
    messages = run_ranks(2, _damaged, directory)
    assert messages == [messages[0]] * 2 and f"{directory / '__1_0.distcp'}: is missing" in messages[0]


def _until_killed(rank: int, run: Path, victim: int) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(run / "store"), 3)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=3)
    mesh, saver, write = Mesh.create(layout_of("tp3"), CPU), Saver(), dcp.write
    entries = entries_of(mesh, global_state())
    saver.save(run, entries, replace(STATE, step=1), 5, mesh)
    saver.wait()

    def die(directory: Path, state: dict[str, dcp.Boxes], number: int) -> dcp.Written:
        written = write(directory, state, number)
        if rank == victim:
            os.kill(os.getpid(), signal.SIGKILL)
        return written

    dcp.write = die
    saver.save(run, entries, replace(STATE, step=2), 5, mesh)
    try:
        saver.wait()
    except RuntimeError:  # torch's, of the lost connection
        os._exit(3)
    except RunError:
        os._exit(4)
    os._exit(0)


@pytest.mark.parametrize("victim", [0, 2])
def test_a_rank_killed_while_saving_leaves_the_checkpoint_before(
    tmp_path: Path, victim: int, run_ranks: RunRanks
) -> None:
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=_until_killed, args=(rank, tmp_path, victim)) for rank in range(3)]
    for process in ranks:
        process.start()
    deadline = time.monotonic() + 60
    for process in ranks:
        process.join(max(deadline - time.monotonic(), 0.1))
    codes = [process.exitcode for process in ranks]
    for process in ranks:
        process.kill()
    assert codes[victim] == -signal.SIGKILL
    assert all(code in (3, 4) for rank, code in enumerate(codes) if rank != victim), codes
    (newest,) = checkpoints(tmp_path)
    assert load_trainer_state(newest).step == 1
    assert all(run_ranks(2, load_as, "dp2", newest))
    run_ranks(3, save_as, "tp3", tmp_path)
    names = [path.name for path in (tmp_path / "checkpoints").iterdir()]
    assert sorted(names) == ["step-00000001", "step-00000003"]
