"""The streaming conversion: what is written, resuming, memory, refusals."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moeforge.checkpoint import Checkpoint, ShardWriter, canonical_shapes, open_checkpoint
from moeforge.checkpoint import writer as writer_module
from moeforge.errors import RunError, UserError
from moeforge.upcycle import UpcycleConfig, upcycle, verify
from moeforge.upcycle.methods import FFN, make_expert

MakeDense = Callable[..., Checkpoint]


def files(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(directory.iterdir())}


def expert(checkpoint: Checkpoint, layer: int, index: int) -> FFN:
    block = f"model.layers.{layer}.block_sparse_moe.experts.{index}"
    return FFN(*(checkpoint.tensor(f"{block}.{part}.weight") for part in ("w1", "w3", "w2")))


def dense_ffn(checkpoint: Checkpoint, layer: int) -> FFN:
    parts = ("gate", "up", "down")
    return FFN(*(checkpoint.tensor(f"model.layers.{layer}.mlp.{part}_proj.weight") for part in parts))


def test_copy_keeps_everything_and_adds_a_router(make_dense: MakeDense, tmp_path: Path) -> None:
    dense = make_dense(dtype=torch.bfloat16)
    result = upcycle(dense, tmp_path / "out", UpcycleConfig(num_experts=4))
    moe = open_checkpoint(result.path)
    assert moe.config == result.config and moe.config.moe is not None
    assert (moe.config.moe.num_experts, moe.config.moe.top_k, moe.config.moe.gate_norm) == (4, 2, 1.0)
    assert moe.names == tuple(canonical_shapes(result.config))
    for name in set(moe.names) & set(dense.names):
        assert torch.equal(moe.tensor(name), dense.tensor(name)) and moe.dtype(name) == torch.bfloat16
    for layer in range(3):
        for index in range(4):
            for mine, theirs in zip(expert(moe, layer, index), dense_ffn(dense, layer), strict=True):
                assert torch.equal(mine, theirs)
        assert moe.tensor(f"model.layers.{layer}.block_sparse_moe.gate.weight").float().std() > 0.01
    assert result.params_total == sum(moe.tensor(name).numel() for name in moe.names)
    assert result.params_active < result.params_total
    assert not (tmp_path / ".out.partial").exists()


def test_random_methods_write_what_the_functions_give(make_dense: MakeDense, tmp_path: Path) -> None:
    dense = make_dense()
    config = UpcycleConfig(num_experts=4, method="drop", seed=7)
    moe = open_checkpoint(upcycle(dense, tmp_path / "out", config).path)
    for mine, theirs in zip(expert(moe, 2, 3), make_expert([dense_ffn(dense, 2)], config, 2, 3), strict=True):
        assert torch.equal(mine, theirs)


def test_lambda_as_a_parameter_starts_where_it_is_asked_to(make_dense: MakeDense, tmp_path: Path) -> None:
    config = UpcycleConfig(num_experts=4, gate_norm=0.5, gate_norm_learned=True)
    upcycle(make_dense(), tmp_path / "out", config)
    made = open_checkpoint(tmp_path / "out")
    assert made.config.moe is not None and made.config.moe.gate_norm_learned
    assert [made.tensor(f"model.layers.{i}.block_sparse_moe.gate.scale").item() for i in range(3)] == [0.5] * 3
    check = verify(make_dense("again"), made, torch.arange(40), config.preserves_function())
    assert check.preserves_function and check.passed


def test_layer_frequency_leaves_dense_layers(make_dense: MakeDense, tmp_path: Path) -> None:
    dense = make_dense(num_layers=4)
    moe = open_checkpoint(upcycle(dense, tmp_path / "out", UpcycleConfig(layer_frequency=2)).path)
    assert moe.config.moe_layers == (1, 3)
    assert torch.equal(dense_ffn(moe, 2).w2, dense_ffn(dense, 2).w2)


@pytest.mark.parametrize("dtype, stored", [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_stored_type(make_dense: MakeDense, tmp_path: Path, dtype: Any, stored: torch.dtype) -> None:
    source = make_dense(dtype=torch.float16)
    moe = open_checkpoint(upcycle(source, tmp_path / "out", UpcycleConfig(dtype=dtype)).path)
    assert {moe.dtype(name) for name in moe.names} == {stored}


def test_mixture_without_normalisation_is_mixtral(make_dense: MakeDense, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    dense = make_dense()
    upcycle(dense, tmp_path / "out", UpcycleConfig(num_experts=4, gate_norm=None))
    tokens = torch.arange(40)[None]
    mixtral = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    llama = AutoModelForCausalLM.from_pretrained(dense.path, dtype=torch.float32)
    assert type(mixtral).__name__ == "MixtralForCausalLM"
    with torch.no_grad():
        torch.testing.assert_close(mixtral(tokens).logits, llama(tokens).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shared", ["average", "first"])
def test_several_donors(make_dense: MakeDense, tmp_path: Path, shared: Any) -> None:
    a, b = make_dense("a", seed=1), make_dense("b", seed=2)
    config = UpcycleConfig(num_experts=4, shared=shared)
    moe = open_checkpoint(upcycle([a, b], tmp_path / "out", config).path)
    for index, donor in enumerate((a, a, b, b)):
        assert torch.equal(expert(moe, 1, index).w1, dense_ffn(donor, 1).w1)
    name = "model.layers.1.self_attn.q_proj.weight"
    expected = (a.tensor(name) + b.tensor(name)) / 2 if shared == "average" else a.tensor(name)
    torch.testing.assert_close(moe.tensor(name), expected, rtol=0, atol=1e-7)
    assert not config.preserves_function(donors=2)


def test_donors_must_be_alike(make_dense: MakeDense, make_tokenizer: Any, tmp_path: Path) -> None:
    a = make_dense("a")
    with pytest.raises(UserError, match="ffn_size = 64, but 48 in"):
        upcycle([a, make_dense("b", ffn_size=64)], tmp_path / "out", UpcycleConfig())
    with pytest.raises(UserError, match="9 donors; at most 8"):
        upcycle([a] * 9, tmp_path / "out", UpcycleConfig())
    a, c = make_tokenizer(a, ["one", "two"]), make_tokenizer(make_dense("c"), ["one", "three"])
    with pytest.raises(UserError, match="another tokenizer"):
        upcycle([a, c], tmp_path / "out", UpcycleConfig())
    assert not (tmp_path / "out").exists() and not (tmp_path / ".out.partial").exists()


def test_tokenizer_comes_along_and_must_fit(make_dense: MakeDense, make_tokenizer: Any, tmp_path: Path) -> None:
    source = make_tokenizer(make_dense(), ["one", "two"])
    upcycle(source, tmp_path / "out", UpcycleConfig())
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (source.path / "tokenizer.json").read_bytes()
    big = make_tokenizer(make_dense("big"), [f"w{i}" for i in range(200)])
    with pytest.raises(UserError, match="ids up to 200 but the embedding"):
        upcycle(big, tmp_path / "out2", UpcycleConfig())


@pytest.mark.parametrize("method", ["copy", "noise", "drop", "virtual-group"])
@pytest.mark.parametrize("stop", [1, 20, 47, -1])
def test_resumed_equals_uninterrupted(
    make_dense: MakeDense, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: Any, stop: int
) -> None:
    """Killed while writing weight number `stop` (-1: while the directory is being finished)."""
    dense, config = make_dense(), UpcycleConfig(num_experts=4, method=method)
    upcycle(dense, tmp_path / "whole", config, shard_bytes=30_000)

    class Killed(BaseException):
        pass

    count = 0
    add, write_json = ShardWriter.add, writer_module.write_json

    def add_until(self: ShardWriter, name: str, tensor: torch.Tensor) -> None:
        nonlocal count
        count += 1
        if count == stop:
            raise Killed
        add(self, name, tensor)

    def write_until(path: Path, data: dict[str, Any]) -> None:
        raise Killed

    if stop > 0:
        monkeypatch.setattr(ShardWriter, "add", add_until)
    else:
        monkeypatch.setattr(writer_module, "write_json", write_until)
    with pytest.raises(Killed):
        upcycle(dense, tmp_path / "out", config, shard_bytes=30_000)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(ShardWriter, "add", add)
    monkeypatch.setattr(writer_module, "write_json", write_json)

    other = UpcycleConfig(num_experts=4, method=method, seed=5)
    with pytest.raises(UserError, match="another seed .*it had 0, now 5"):
        upcycle(dense, tmp_path / "out", other, shard_bytes=30_000)
    result = upcycle(dense, tmp_path / "out", config, shard_bytes=30_000)
    assert result.resumed == (stop != 1)
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_changed_source_is_not_gone_on_with(make_dense: MakeDense, tmp_path: Path) -> None:
    dense = make_dense()

    class Killed(BaseException):
        pass

    def kill(written: int, total: int) -> None:
        if written > total / 2:
            raise Killed

    with pytest.raises(Killed):
        upcycle(dense, tmp_path / "out", UpcycleConfig(), progress=kill, shard_bytes=30_000)
    (dense.path / "model.safetensors").touch()
    with pytest.raises(UserError, match="another source is there"):
        upcycle(dense, tmp_path / "out", UpcycleConfig(), shard_bytes=30_000)


def test_progress_ends_at_the_announced_bytes(make_dense: MakeDense, tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    upcycle(make_dense(), tmp_path / "out", UpcycleConfig(), progress=lambda *call: calls.append(call))
    written, total = calls[-1]
    size = (tmp_path / "out/model.safetensors").stat().st_size
    assert written == total and [call[0] for call in calls] == sorted(call[0] for call in calls)
    assert 0 <= size - total < 100_000  # the header


@pytest.mark.parametrize("value, word", [(float("nan"), "NaN"), (float("inf"), "infinite")])
def test_weights_that_are_not_finite(make_dense: MakeDense, tmp_path: Path, value: float, word: str) -> None:
    from safetensors.torch import load_file, save_file

    dense = make_dense()
    weights = load_file(dense.path / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = value
    save_file(weights, dense.path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=rf"model\.layers\.1\.mlp\.up_proj\.weight.*{word}"):
        upcycle(open_checkpoint(dense.path), tmp_path / "out", UpcycleConfig())
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_refuses_a_mixture_and_an_output_in_use(make_dense: MakeDense, tmp_path: Path) -> None:
    dense = make_dense()
    moe = open_checkpoint(upcycle(dense, tmp_path / "out", UpcycleConfig()).path)
    before = files(tmp_path / "out")
    with pytest.raises(UserError, match="already a mixture"):
        upcycle(moe, tmp_path / "out2", UpcycleConfig())
    with pytest.raises(UserError, match="already exists"):
        upcycle(dense, tmp_path / "out", UpcycleConfig())
    assert files(tmp_path / "out") == before


def test_too_small_a_disk_is_known_before_writing(
    make_dense: MakeDense, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("usage", (), {"free": 1000})
    monkeypatch.setattr(writer_module.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(RunError, match="GB of disk"):
        upcycle(make_dense(), tmp_path / "out", UpcycleConfig())
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


RUN = """
import json, sys, torch
from pathlib import Path
from moeforge.checkpoint import open_checkpoint
from moeforge.upcycle import UpcycleConfig, upcycle
torch.set_num_threads(1)
result = upcycle(open_checkpoint(sys.argv[1]), Path(sys.argv[2]), UpcycleConfig(method=sys.argv[3]))
print(json.dumps({"peak": result.peak_anonymous_bytes, "params": result.params_total}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="RssAnon is Linux's")
@pytest.mark.parametrize("method", ["copy", pytest.param("drop", marks=pytest.mark.slow)])
def test_memory_does_not_grow_with_layers(make_dense: MakeDense, tmp_path: Path, method: str) -> None:
    """Ten layers against sixty of 2 MB each (13 MB as a mixture): less than 10 % more anonymous memory."""
    peak = {}
    for layers in (10, 60):
        dense = make_dense(
            str(layers), torch.bfloat16, num_layers=layers, hidden_size=256, ffn_size=1024, vocab_size=512
        )
        command = [sys.executable, "-c", RUN, str(dense.path), str(tmp_path / f"moe{layers}"), method]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        peak[layers] = json.loads(out)["peak"]
    assert peak[60] < 1.1 * peak[10], peak
