"""Loading one rank's part."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moeforge.checkpoint import load_model, open_checkpoint
from moeforge.errors import UserError
from moeforge.layout import build_layout, serving_layout
from moeforge.model import DenseAttention
from moeforge.serve.load import dummy_rank, load_rank
from moeforge.serve.virtual import VirtualRanks

from .families import cut, family


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
