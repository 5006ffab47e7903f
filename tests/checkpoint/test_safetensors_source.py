"""Safetensors: one file or shards, and every way in which they can be incomplete."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from moeforge.checkpoint import open_checkpoint
from moeforge.errors import UserError


def _refusal(directory: Path) -> str:
    with pytest.raises(UserError) as caught:
        open_checkpoint(directory)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_shards_hold_what_one_file_holds(saved: Path, sharded: Path) -> None:
    one, many = open_checkpoint(saved), open_checkpoint(sharded)
    assert one.names == many.names
    assert len(list(sharded.glob("*.safetensors"))) > 3
    for name in one.names:
        assert torch.equal(one.tensor(name), many.tensor(name))
        assert one.shape(name) == tuple(one.tensor(name).shape)
        assert one.dtype(name) == torch.float32


def test_a_missing_shard_is_named(sharded: Path) -> None:
    lost = sorted(sharded.glob("*.safetensors"))[1]
    lost.unlink()
    message = _refusal(sharded)
    assert lost.name in message
    assert "half-downloaded" in message


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_truncated_file_is_named(saved: Path, keep: int) -> None:
    file = saved / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    message = _refusal(saved)
    assert str(file) in message
    assert "half-downloaded" in message


def test_a_pointer_instead_of_the_file(saved: Path) -> None:
    (saved / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    assert "half-downloaded" in _refusal(saved)


def test_an_index_that_names_what_a_shard_lacks(sharded: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    files = sorted(set(data["weight_map"].values()))
    data["weight_map"]["model.norm.weight"] = next(
        file for file in files if file != data["weight_map"]["model.norm.weight"]
    )
    index.write_text(json.dumps(data))
    assert "lacks model.norm.weight" in _refusal(sharded)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"weight_map": 3}'])
def test_an_index_that_is_none(sharded: Path, text: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(text)
    assert "model.safetensors.index.json" in _refusal(sharded)
