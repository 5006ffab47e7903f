"""Streaming out: shards, index, resuming after a kill, a full disk."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from moeforge.checkpoint import ShardWriter, canonical_shapes, open_checkpoint, require_disk_space
from moeforge.config.model import ModelConfig, MoEConfig
from moeforge.errors import RunError, UserError

CONFIG = ModelConfig(
    vocab_size=64, hidden_size=32, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8, ffn_size=48,
    moe=MoEConfig(num_experts=4, top_k=2, expert_size=48), family="mixtral",
)  # fmt: skip
WEIGHTS = {name: torch.randn(shape) for name, shape in canonical_shapes(CONFIG).items()}


def _fill(writer: ShardWriter, count: int | None = None) -> None:
    for name in list(WEIGHTS)[:count]:
        if name not in writer.done:
            writer.add(name, WEIGHTS[name])


def _assert_complete(directory: Path) -> None:
    checkpoint = open_checkpoint(directory)
    for name, weight in WEIGHTS.items():
        assert torch.equal(checkpoint.tensor(name), weight), name
    assert not list(directory.parent.glob(".*")), "nothing is left beside the directory"
    assert not list(directory.glob("journal*"))


def test_one_shard_has_no_index(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "out", CONFIG)
    _fill(writer)
    assert not (tmp_path / "out").exists(), "the directory appears only when it is whole"
    assert writer.finish() == tmp_path / "out"
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]
    _assert_complete(tmp_path / "out")


def test_many_shards_and_their_index(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "out", CONFIG, shard_bytes=50_000)
    _fill(writer)
    writer.finish()
    _assert_complete(tmp_path / "out")
    text = (tmp_path / "out" / "model.safetensors.index.json").read_text()
    index = json.loads(text)
    shards = sorted(file.name for file in (tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 3
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    assert sorted(set(index["weight_map"].values())) == shards
    assert list(index["weight_map"]) == sorted(WEIGHTS)
    assert index["metadata"]["total_size"] == 4 * CONFIG.parameters()
    assert text.endswith("}\n")


def test_weights_go_to_the_disk_at_once(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "out", CONFIG)
    written = 0
    for name, weight in WEIGHTS.items():
        writer.add(name, weight)
        written += weight.nbytes
        assert (writer.partial / "shard.tmp").stat().st_size >= written - 8192  # Python's own small buffer


@pytest.mark.parametrize("added", [0, 1, 10, 25, len(WEIGHTS)])
def test_an_interrupted_writer_goes_on(tmp_path: Path, added: int) -> None:
    killed = ShardWriter(tmp_path / "out", CONFIG, shard_bytes=50_000, job="a")
    _fill(killed, added)
    writer = ShardWriter(tmp_path / "out", CONFIG, shard_bytes=50_000, job="a")
    assert writer.done == killed.done
    assert len(writer.done) >= added - 12, "at most the open shard is lost"
    _fill(writer)
    writer.finish()
    _assert_complete(tmp_path / "out")


def test_a_journal_line_cut_short_costs_one_shard(tmp_path: Path) -> None:
    killed = ShardWriter(tmp_path / "out", CONFIG, shard_bytes=50_000)
    _fill(killed, 30)
    journal = killed.partial / "journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-9])
    again = ShardWriter(tmp_path / "out", CONFIG, shard_bytes=50_000)
    assert 0 < len(again.done) < len(killed.done)
    _fill(again, 40)  # and is killed, too
    third = ShardWriter(tmp_path / "out", CONFIG, shard_bytes=50_000)
    assert third.done == again.done > killed.done
    _fill(third)
    third.finish()
    _assert_complete(tmp_path / "out")


def test_killed_while_finishing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = ShardWriter(tmp_path / "out", CONFIG, shard_bytes=50_000)
    _fill(writer)
    rename = Path.rename
    renamed = 0

    def killed_at_the_third(self: Path, target: Path) -> Path:
        nonlocal renamed
        renamed += target.name.startswith("model-")
        if renamed == 3:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", killed_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        writer.finish()
    monkeypatch.setattr(Path, "rename", rename)
    again = ShardWriter(tmp_path / "out", CONFIG, shard_bytes=50_000)
    assert again.done == set(WEIGHTS)
    again.finish()
    _assert_complete(tmp_path / "out")


def test_remains_of_another_job_are_not_taken_over(tmp_path: Path) -> None:
    _fill(ShardWriter(tmp_path / "out", CONFIG, shard_bytes=50_000, job="seed 0"), 30)
    assert ShardWriter(tmp_path / "out", CONFIG, shard_bytes=50_000, job="seed 1").done == set()


def test_only_the_models_weights_each_once(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "out", CONFIG)
    with pytest.raises(ValueError, match=r"extra.weight"):
        writer.add("extra.weight", torch.zeros(3))
    with pytest.raises(ValueError, match=r"\(64, 31\).*\(64, 32\)"):
        writer.add("model.embed_tokens.weight", torch.zeros(64, 31))
    _fill(writer, 3)
    with pytest.raises(ValueError, match="twice"):
        writer.add("model.embed_tokens.weight", WEIGHTS["model.embed_tokens.weight"])
    with pytest.raises(ValueError, match="never added"):
        writer.finish()


def test_views_and_other_dtypes(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "out", CONFIG)
    for name, weight in WEIGHTS.items():
        tensor = weight.bfloat16()
        writer.add(name, tensor.t().contiguous().t() if tensor.ndim == 2 else tensor)
    checkpoint = open_checkpoint(writer.finish())
    for name, weight in WEIGHTS.items():
        assert torch.equal(checkpoint.tensor(name), weight.bfloat16())


@contextmanager
def _largest_file(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_loses_nothing_that_was_written(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "out", CONFIG, shard_bytes=25_000)
    _fill(writer, 14)
    saved = writer.done
    assert saved
    with _largest_file(30_000), pytest.raises(RunError) as caught:
        for name in list(WEIGHTS)[14:]:
            writer.add(name, WEIGHTS[name])
    message = str(caught.value)
    assert "\n" not in message
    assert "the disk is full" in message
    saved = writer.done
    assert f"{len(saved)} of {len(WEIGHTS)} weights are saved" in message
    again = ShardWriter(tmp_path / "out", CONFIG, shard_bytes=25_000)
    assert again.done == saved
    _fill(again)
    again.finish()
    _assert_complete(tmp_path / "out")


def test_disk_space_is_asked_for_where_the_directory_will_be(tmp_path: Path) -> None:
    require_disk_space(tmp_path / "not" / "yet", 1)
    with pytest.raises(RunError, match=r"needs 1000000000\.0 GB of disk, .* GB are available"):
        require_disk_space(tmp_path / "not" / "yet", 10**18)


def test_a_directory_in_use_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    ShardWriter(tmp_path / "empty", CONFIG)
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="already exists"):
        ShardWriter(tmp_path / "file", CONFIG)
