"""Torch archives: weights only, mapped, and refused where they are anything else."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moeforge.checkpoint import open_checkpoint
from moeforge.errors import UserError


@pytest.fixture
def as_bin(saved: Path, tmp_path: Path) -> Path:
    """The small Llama as one pytorch_model.bin."""
    (tmp_path / "bin").mkdir()
    shutil.copy(saved / "config.json", tmp_path / "bin")
    torch.save(_state(saved), tmp_path / "bin" / "pytorch_model.bin")
    return tmp_path / "bin"


def _state(saved: Path) -> dict[str, Tensor]:
    source = open_checkpoint(saved)
    return {name: source.tensor(name).clone() for name in source.names}


def _refusal(directory: Path) -> str:
    with pytest.raises(UserError) as caught:
        open_checkpoint(directory)
    message = str(caught.value)
    assert "\n" not in message
    assert "pytorch_model.bin" in message
    return message


def test_holds_what_safetensors_holds(saved: Path, as_bin: Path) -> None:
    one, other = open_checkpoint(saved), open_checkpoint(as_bin)
    for name in one.names:
        assert torch.equal(one.tensor(name), other.tensor(name))


def test_archives_from_before_torch_1_6(saved: Path, as_bin: Path) -> None:
    state = _state(saved)
    torch.save(state, as_bin / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    other = open_checkpoint(as_bin)
    assert all(torch.equal(other.tensor(name), weight) for name, weight in state.items())


def test_tied_weights_are_stored_twice(tmp_path: Path, tiny: Any, our_logits: Any, their_logits: Any) -> None:
    theirs = tiny("Llama", tie_word_embeddings=True)
    theirs.config.save_pretrained(tmp_path / "tied")
    torch.save(theirs.state_dict(), tmp_path / "tied" / "pytorch_model.bin")
    assert open_checkpoint(tmp_path / "tied").config.tie_embeddings
    torch.testing.assert_close(our_logits(tmp_path / "tied"), their_logits(theirs), rtol=0, atol=1e-4)


def test_weights_that_are_not_equal_are_not_tied(tmp_path: Path, tiny: Any) -> None:
    theirs = tiny("Llama", tie_word_embeddings=True)
    theirs.config.save_pretrained(tmp_path / "tied")
    state = {**theirs.state_dict(), "lm_head.weight": theirs.lm_head.weight.detach() + 1}
    torch.save(state, tmp_path / "tied" / "pytorch_model.bin")
    assert not open_checkpoint(tmp_path / "tied").config.tie_embeddings


class _Harmful:
    def __reduce__(self) -> Any:
        return os.system, ("touch harmed",)


@pytest.mark.parametrize("kind", ["torch", "pickle"])
def test_code_is_never_run(as_bin: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(as_bin)
    with (as_bin / "pytorch_model.bin").open("wb") as file:
        torch.save({"model.norm.weight": _Harmful()}, file) if kind == "torch" else pickle.dump(_Harmful(), file)
    assert "not a weights-only checkpoint" in _refusal(as_bin)
    assert not (as_bin / "harmed").exists()


def test_a_truncated_archive(as_bin: Path) -> None:
    file = as_bin / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    assert "half-downloaded" in _refusal(as_bin)


def test_an_empty_file(as_bin: Path) -> None:
    (as_bin / "pytorch_model.bin").write_bytes(b"")
    assert "half-downloaded" in _refusal(as_bin)


def test_a_training_checkpoint_is_not_a_model(as_bin: Path) -> None:
    torch.save({"step": 3, "model": {}}, as_bin / "pytorch_model.bin")
    assert "mapping from names to tensors" in _refusal(as_bin)
