"""Loading one rank's part."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moeforge.checkpoint import dequantized, load_model, open_checkpoint, save_model
from moeforge.config.quantization import QuantizationConfig
from moeforge.errors import UserError
from moeforge.kernels.fp8_weight import dequantize
from moeforge.layout import build_layout, serving_layout
from moeforge.model import DenseAttention
from moeforge.model.units import Experts, Linear
from moeforge.quantize import quantize
from moeforge.serve.load import dummy_rank, load_rank
from moeforge.serve.memory import weight_bytes
from moeforge.serve.virtual import VirtualRanks

from .families import cut, family, random_model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tp", "weights"), [(1, None), (2, (24, 8)), (3, (1, 0, 2)), (5, None)])
@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_a_rank_is_the_cut_of_the_whole(
    kind: str, tp: int, weights: tuple[float, ...] | None, dtype: torch.dtype, saved: Callable[[str], Path]
) -> None:
    checkpoint = open_checkpoint(saved(kind))
    layout = serving_layout(checkpoint.config, tp, weights)
    whole = load_model(checkpoint, dtype)
    for rank in range(tp):
        found = load_rank(checkpoint, layout, rank, dtype)
        expected = cut(whole, layout, rank).state_dict()
        state = found.state_dict()
        assert state.keys() == expected.keys()
        for name, tensor in state.items():
            assert tensor.dtype == dtype and torch.equal(tensor, expected[name]), name
        assert not found.training and not any(p.requires_grad for p in found.parameters())


@pytest.mark.parametrize("name", ["llama, biases", "olmoe", "ours"])
def test_dummy_weights(name: str) -> None:
    config = family(name)
    layout = serving_layout(config, 5)
    ranks = [dummy_rank(config, layout, rank, torch.bfloat16) for rank in range(5)]
    for rank in ranks:
        assert all(p.dtype == torch.bfloat16 and bool(p.isfinite().all()) for p in rank.parameters())
    state = torch.get_rng_state()
    again = dummy_rank(config, layout, 1, torch.bfloat16)
    assert torch.equal(torch.get_rng_state(), state)  # a program's own draws are left alone
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), ranks[1].parameters(), strict=True))
    other = dummy_rank(config, layout, 1, torch.bfloat16, seed=7)
    assert not torch.equal(other.get_parameter("embed.weight"), ranks[1].get_parameter("embed.weight"))

    virtual = VirtualRanks(ranks, layout)
    with torch.inference_mode():
        attentions = [DenseAttention(1, 6) for _ in range(5)]
        hidden = virtual.forward(torch.arange(6), torch.arange(6), attentions)
        logits = virtual.logits(hidden)
    assert logits.shape == (6, config.vocab_size) and bool(logits.isfinite().all())


FP8 = [("tensor", "none"), ("channel", "dynamic"), ("block128", "dynamic"), ("tensor", "static")]


@pytest.mark.parametrize(("scales", "activations"), FP8)
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_fp8_shards_are_cuts_of_the_whole(name: str, scales: Any, activations: Any, tmp_path: Path) -> None:
    """Uneven cuts, at columns that are no multiples of a block or of 16: dequantised, they are cuts of the weights."""
    wide = {"hidden_size": 160, "head_dim": 24, "num_heads": 14, "num_kv_heads": 7, "ffn_size": 360}
    config = dataclasses.replace(family(name), **wide)
    if config.moe is not None:
        config = dataclasses.replace(config, moe=dataclasses.replace(config.moe, expert_size=360))
    plain = open_checkpoint(save_model(random_model(config, torch.float32), tmp_path / "plain"))
    matrices = ("attention.qkv", "attention.o", "ffn.w13", "ffn.w2", "ffn.experts.w13", "ffn.experts.w2")
    inputs = {f"layers.{layer}.{matrix}": 9.0 for layer in range(3) for matrix in matrices}
    quantized = QuantizationConfig(scales, activations, ("layers.2.attention.o",))
    checkpoint = open_checkpoint(quantize(plain, tmp_path / "fp8", quantized, inputs).path)
    whole = load_model(dequantized(checkpoint), torch.float32)
    for tp, weights in ((1, None), (2, (24, 8)), (3, (1, 0, 2)), (5, None)):
        layout = serving_layout(checkpoint.config, tp, weights)
        for rank in range(tp):
            found = load_rank(checkpoint, layout, rank, torch.float32)
            assert weight_bytes(checkpoint.config, layout, rank, torch.float32) == sum(
                parameter.nbytes for parameter in found.parameters()
            )
            expected = cut(whole, layout, rank)
            for path, module in found.named_modules():
                if isinstance(module, Linear) and module.fp8 is not None:
                    held = {f"{path}.weight": module.fp8_weight()}
                elif isinstance(module, Experts):
                    held = dict(zip((f"{path}.w13", f"{path}.w2"), module.fp8_weights(), strict=True))
                else:
                    continue
                for key, weight in held.items():
                    assert torch.equal(dequantize(weight, torch.float32), expected.get_parameter(key)), (key, rank)
            assert found.get_parameter("layers.2.attention.o.weight").dtype == torch.float32


@pytest.mark.parametrize(("scales", "activations"), FP8)
def test_dummy_fp8_weights(scales: Any, activations: Any) -> None:
    config = dataclasses.replace(family("mixtral"), quantization=QuantizationConfig(scales, activations))
    layout = serving_layout(config, 3)
    ranks = [dummy_rank(config, layout, rank, torch.bfloat16) for rank in range(3)]
    for index, rank in enumerate(ranks):
        held = sum(parameter.nbytes for parameter in rank.parameters())
        assert held == weight_bytes(config, layout, index, torch.bfloat16)
        for parameter in rank.parameters():
            assert bool(parameter.float().isfinite().all())
    experts = ranks[0].get_submodule("layers.0.ffn.experts")
    assert isinstance(experts, Experts)
    w13 = dequantize(experts.fp8_weights()[0], torch.float32)
    assert w13.std().item() == pytest.approx(0.02, rel=0.1) and abs(w13.mean().item()) < 0.002
    virtual = VirtualRanks(ranks, layout)
    with torch.inference_mode():
        attentions = [DenseAttention(1, 6) for _ in range(3)]
        logits = virtual.logits(virtual.forward(torch.arange(6), torch.arange(6), attentions))
    assert bool(logits.isfinite().all())


def test_dummy_weights_leave_no_copy_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are drawn into their own storage: on the device meta nothing is ever held."""
    config = dataclasses.replace(family("mixtral"), hidden_size=1 << 16, ffn_size=1 << 20, vocab_size=1 << 24)
    part = dummy_rank(config, serving_layout(config, 2), 1, torch.bfloat16, "meta")
    assert sum(p.numel() for p in part.parameters()) > 5e11


def test_layouts_that_are_not_for_serving(saved: Callable[[str], Path]) -> None:
    checkpoint = open_checkpoint(saved("mixtral"))
    config = checkpoint.config
    for layout in (
        build_layout(config, tp=2),
        build_layout(config, pp=2),
        build_layout(config, dp=2, ep=1),
        build_layout(config, chunks=2, schedule="interleaved-1f1b"),
    ):
        with pytest.raises(UserError, match="moeforge plan serve"):
            load_rank(checkpoint, layout, 0, torch.float32)
    with pytest.raises(UserError, match="another model"):
        load_rank(checkpoint, serving_layout(family("llama"), 2), 0, torch.float32)
    with pytest.raises(UserError, match="another model"):
        dummy_rank(config, serving_layout(family("llama"), 2), 0, torch.float32)
