"""State saved in any division over ranks is found, bit for bit, by any other; damage is named."""

from __future__ import annotations

import math
import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moeforge.errors import UserError
from moeforge.parallel.parameters import ParameterPart, StateEntry
from moeforge.train.dcp import Boxes, SavedState, Written, boxes_of, missing_files, write, write_metadata

Views = dict[str, tuple[int, ...]]
VIEWS: Views = {"matrix": (7, 5), "experts": (3, 2, 5, 4), "norm": (6,), "scale": ()}


def cuts(size: int, ranks: int, seed: int) -> list[int]:
    """Boundaries of `ranks` ranges over `size`, some of them empty."""
    generator = torch.Generator().manual_seed(seed)
    inner = torch.randint(size + 1, (ranks - 1,), generator=generator).sort().values.tolist()
    return [0, *inner, size]


def global_tensors(views: Views = VIEWS) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(view, generator=generator) for name, view in views.items()}


def entries_of(rank: int, ranks: int, seed: int, whole: dict[str, Tensor] | None) -> list[StateEntry]:
    """The state of one rank: each tensor cut into boxes along one dimension over some of the ranks, and each box into
    flat ranges over the others. Zeros where `whole` is None."""
    flats = ranks if seed % 3 == 0 else 2 if ranks % 2 == 0 else 1
    boxes = ranks // flats
    entries = []
    for number, (name, view) in enumerate(VIEWS.items()):
        offset, size = [0] * len(view), list(view)
        if view:
            dim = (seed + number) % len(view)
            edges = cuts(view[dim], boxes, seed + number)
            offset[dim] = edges[rank // flats]
            size[dim] = edges[rank // flats + 1] - offset[dim]
            edges = cuts(math.prod(size), flats, seed + number)
            begin, end = edges[rank % flats], edges[rank % flats + 1]
        else:
            begin, end = 0, int(rank == seed % ranks)
        part = ParameterPart(name, view, tuple(offset), tuple(size), tuple(size), "dp")
        found = torch.zeros(end - begin)
        if whole is not None:
            found = part.cut(whole[name]).flatten()[begin:end].clone()
        entries.append(StateEntry(f"weight.{name}", part, begin, end, found, saved=True))
    return entries


def save(directory: Path, ranks: int, seed: int, whole: dict[str, Tensor]) -> list[Written]:
    written = [
        write(directory, boxes_of(entries_of(rank, ranks, seed, whole), torch.clone), rank) for rank in range(ranks)
    ]
    write_metadata(directory, written)
    return written


@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 1000), st.integers(0, 1000))
def test_any_division_finds_what_any_other_saved(
    tmp_path_factory: pytest.TempPathFactory, savers: int, loaders: int, seed: int, other: int
) -> None:
    directory, whole = tmp_path_factory.mktemp("dcp") / "state", global_tensors()
    assert missing_files(directory, save(directory, savers, seed, whole)) == []
    saved = SavedState(directory)
    for rank in range(loaders):
        entries = entries_of(rank, loaders, other, None)
        saved.read(boxes_of(entries, lambda tensor: tensor))
        for entry, expected in zip(entries, entries_of(rank, loaders, other, whole), strict=True):
            assert torch.equal(entry.tensor, expected.tensor), entry.key
    for name, tensor in whole.items():
        assert torch.equal(saved.tensor(f"weight.{name}"), tensor)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_every_type_keeps_its_bits(tmp_path: Path, dtype: torch.dtype) -> None:
    whole = torch.randn(5, 3).to(dtype)
    part = ParameterPart("x", (5, 3), (0, 0), (5, 3), (5, 3), "dp")
    state = boxes_of([StateEntry("weight.x", part, 0, 15, whole.view(-1), True)], torch.clone)
    write_metadata(tmp_path, [write(tmp_path, state, 0)])
    found = SavedState(tmp_path).tensor("weight.x")
    assert found.dtype == dtype and torch.equal(found, whole)


def test_state_that_overlaps_or_has_gaps_is_not_saved(tmp_path: Path) -> None:
    def rows(begin: int, end: int) -> dict[str, Boxes]:
        held = Boxes((4, 2))
        held.add((begin, 0), torch.zeros(end - begin, 2))
        return {"weight.x": held}

    for second in (rows(1, 4), rows(3, 4)):
        written = [write(tmp_path, rows(0, 2), 0), write(tmp_path, second, 1)]
        with pytest.raises(ValueError, match=r"weight\.x"):
            write_metadata(tmp_path, written)


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    save(tmp_path, 3, 1, global_tensors())
    saved = SavedState(tmp_path)
    with pytest.raises(UserError, match=r"exp_avg\.norm is missing"):
        saved.tensor("exp_avg.norm")
    other = Boxes((7, 6))
    other.add((0, 0), torch.zeros(7, 6))
    with pytest.raises(UserError, match=r"weight\.matrix has shape \(7, 5\), this model needs \(7, 6\)"):
        saved.read({"weight.matrix": other})
    held = Boxes((4, 2))
    held.add((0, 0), torch.zeros(2, 2))
    write_metadata(tmp_path / "half", [write(tmp_path / "half", {"weight.x": held}, 0)])
    with pytest.raises(UserError, match=r"lacks a part of weight\.x"):
        SavedState(tmp_path / "half").tensor("weight.x")


@pytest.mark.parametrize("file", [".metadata", "__1_0.distcp"])
@pytest.mark.parametrize("damage", ["missing", "cut", "garbage"])
def test_damaged_files_are_named(tmp_path: Path, file: str, damage: str, capfd: pytest.CaptureFixture[str]) -> None:
    save(tmp_path, 2, 1, global_tensors())
    path = tmp_path / file
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(content[: len(content) // 2] if damage == "cut" else b"\x07" * 50)
    with pytest.raises(UserError, match=rf"{file}: (is missing|cannot be read \(.*\)); the checkpoint") as caught:
        saved = SavedState(tmp_path)
        for name in VIEWS:
            saved.tensor(f"weight.{name}")
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""


class _Evil:
    def __reduce__(self) -> object:
        return print, ("code of the checkpoint runs",)


def test_reading_runs_no_code(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for evil in (_Evil(), {"a": pytest.fail}):
        (tmp_path / ".metadata").write_bytes(pickle.dumps(evil))
        with pytest.raises(UserError, match="which no checkpoint needs"):
            SavedState(tmp_path)
    (tmp_path / ".metadata").write_bytes(pickle.dumps({}))
    with pytest.raises(UserError, match="holds something else"):
        SavedState(tmp_path)
    assert capfd.readouterr().out == ""
