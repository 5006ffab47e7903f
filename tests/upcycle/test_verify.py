"""Verification against the dense model: what preserves the function differs by rounding only."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moeforge.checkpoint import Checkpoint, open_checkpoint
from moeforge.errors import RunError, UserError
from moeforge.upcycle import UpcycleConfig, Verification, sample_tokens, upcycle, verify

MakeDense = Callable[..., Checkpoint]


def run(dense: Checkpoint, out: Path, config: UpcycleConfig, **options: Any) -> Verification:
    moe = open_checkpoint(upcycle(dense, out, config).path)
    return verify(dense, moe, sample_tokens(dense, limit=64), config.preserves_function(), **options)


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_experts": 8},
        {"num_experts": 4, "top_k": 3, "gate_norm": 2.0},
        {"num_experts": 2, "gate_norm": None},
        {"layer_frequency": 2},
        {"method": "virtual-group", "num_experts": 8, "top_k": 2},
        {"method": "virtual-group", "num_experts": 12, "top_k": 6, "granularity": 3},
        {"method": "virtual-group", "num_experts": 16, "top_k": 8, "granularity": 4, "gate_norm": None},
    ],
)
@pytest.mark.parametrize(
    "model",
    [{}, {"tie_embeddings": True}, {"qkv_bias": True, "qk_norm": "head"}, {"dtype": torch.bfloat16}],
    ids=["llama", "tied", "bias-and-norm", "bf16"],
)
def test_preserving_methods_differ_by_rounding(
    make_dense: MakeDense, tmp_path: Path, arguments: dict[str, Any], model: dict[str, Any]
) -> None:
    config = UpcycleConfig(**arguments)
    result = run(make_dense(**model), tmp_path / "out", config)
    assert result.preserves_function and result.passed
    assert result.max_logit > 0.5 and len(result.layer_max_diff) == 3
    if config.shards != 3 or "dtype" not in model:  # a third cannot be written in bfloat16
        assert result.max_logit_diff < 2e-5 and result.argmax_agreement == 1
    result.require()


def test_double_precision_shows_that_it_is_rounding(make_dense: MakeDense, tmp_path: Path) -> None:
    config = UpcycleConfig(method="virtual-group", num_experts=16, top_k=8, granularity=4)
    assert run(make_dense(), tmp_path / "out", config, dtype=torch.float64).max_logit_diff < 1e-13


@pytest.mark.parametrize("arguments", [{"method": "noise"}, {"method": "drop"}])
def test_other_methods_are_measured_not_judged(
    make_dense: MakeDense, tmp_path: Path, arguments: dict[str, Any]
) -> None:
    result = run(make_dense(), tmp_path / "out", UpcycleConfig(**arguments))
    assert not result.preserves_function and result.max_logit_diff > result.bound
    result.require()


def test_narrower_storage_is_not_held_against_the_method(make_dense: MakeDense, tmp_path: Path) -> None:
    result = run(make_dense(), tmp_path / "out", UpcycleConfig(dtype="bf16"))
    assert result.max_logit_diff < 2e-5


@pytest.mark.parametrize("stored", ["keep", "bf16", "fp32"])
@pytest.mark.parametrize(
    ("dtype", "norms"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), (torch.float16, None)]
)
@pytest.mark.parametrize("frequency", [1, 2])
def test_each_weight_is_rounded_to_the_type_that_was_written_for_it(
    make_dense: MakeDense, tmp_path: Path, stored: Any, dtype: torch.dtype, norms: torch.dtype | None, frequency: int
) -> None:
    config = UpcycleConfig(dtype=stored, layer_frequency=frequency)
    result = run(make_dense(dtype=dtype, norms=norms), tmp_path / "out", config)
    assert result.passed and result.max_logit_diff < 2e-5


@pytest.mark.parametrize("name", ["model.layers.1.block_sparse_moe.experts.2.w2.weight", "lm_head.weight"])
def test_one_wrong_weight_is_found(make_dense: MakeDense, tmp_path: Path, name: str) -> None:
    from safetensors.torch import load_file, save_file

    dense = make_dense()
    upcycle(dense, tmp_path / "out", UpcycleConfig(num_experts=4))
    weights = load_file(tmp_path / "out/model.safetensors")
    weights[name] += 0.01
    save_file(weights, tmp_path / "out/model.safetensors", metadata={"format": "pt"})
    result = verify(dense, open_checkpoint(tmp_path / "out"), sample_tokens(dense), True)
    assert not result.passed
    with pytest.raises(RunError, match="first to differ is " + ("layer 1" if "layers" in name else "the head")):
        result.require()


def test_not_a_number_does_not_pass() -> None:
    nan = float("nan")
    assert not Verification(1, nan, 1.0, 0.0, (nan,), 1e-5, True).passed


def test_progress_counts_layers_and_the_head(make_dense: MakeDense, tmp_path: Path) -> None:
    calls: list[int] = []
    run(make_dense(), tmp_path / "out", UpcycleConfig(), progress=calls.append)
    assert calls == [1, 2, 3, 4]


def test_sample_tokens(make_dense: MakeDense, make_tokenizer: Any) -> None:
    bare = make_dense()
    assert torch.equal(sample_tokens(bare), sample_tokens(bare)) and len(sample_tokens(bare)) == 128
    assert sample_tokens(bare).max() < bare.config.vocab_size
    with pytest.raises(UserError, match="no tokenizer"):
        sample_tokens(bare, "some text")
    worded = make_tokenizer(bare, ["harbour", "the"])
    assert sample_tokens(worded, "the harbour the sea").tolist() == [2, 1, 2, 0]
    assert {1, 2} <= set(sample_tokens(worded).tolist())
    with pytest.raises(UserError, match="no tokens"):
        sample_tokens(worded, " ")
