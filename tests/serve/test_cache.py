"""The cached attention against whole sequences through the same model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moeforge.config.model import ModelConfig, MoEConfig
from moeforge.model import DenseAttention, ForwardContext, Transformer
from moeforge.serve.cache import KVCache

LENGTHS = [5, 1, 9]
DTYPE = torch.float64


def build(window: int | None, kv_heads: int, moe: bool) -> Transformer:
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=70,
        hidden_size=32,
        num_layers=3,
        num_heads=4,
        num_kv_heads=kv_heads,
        head_dim=8,
        ffn_size=48,
        sliding_window=window,
        sliding_window_first_layer=1,
        moe=MoEConfig(num_experts=4, top_k=2, expert_size=24, gate_norm=1.0) if moe else None,
    )
    model = Transformer(config)
    model.reset_parameters(std=0.3)
    return model.to(DTYPE)


def whole(model: Transformer, tokens: Tensor) -> Tensor:
    """Logits of one sequence without a cache."""
    context = ForwardContext(DenseAttention(1, len(tokens)))
    return model.logits(model(tokens, torch.arange(len(tokens)), context), context)


@pytest.mark.parametrize("moe", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("window", [None, 3, 7])
@torch.inference_mode()
def test_prefill_and_decode_equal_the_full_forward(window: int | None, kv_heads: int, moe: bool) -> None:
    model = build(window, kv_heads, moe)
    steps = 6
    texts = [torch.randint(0, 70, (n + steps,)) for n in LENGTHS]
    expected = [whole(model, text) for text in texts]
    cache = KVCache(model.config, len(LENGTHS), max(LENGTHS) + steps, DTYPE)

    context = ForwardContext(cache.prefill(LENGTHS))
    tokens = torch.cat([text[:n] for text, n in zip(texts, LENGTHS, strict=True)])
    positions = torch.cat([torch.arange(n) for n in LENGTHS])
    logits = model.logits(model(tokens, positions, context), context)
    torch.testing.assert_close(
        logits, torch.cat([e[:n] for e, n in zip(expected, LENGTHS, strict=True)]), rtol=1e-9, atol=1e-9
    )

    alive = [0, 1, 2]
    for step in range(steps):
        if step == 3:  # the middle one leaves, the last one moves into its row
            cache.keep([0, 2])
            alive = [0, 2]
        places = [LENGTHS[i] + step for i in alive]
        context = ForwardContext(cache.decode())
        tokens = torch.stack([texts[i][place] for i, place in zip(alive, places, strict=True)])
        logits = model.logits(model(tokens, torch.tensor(places), context), context)
        wanted = torch.stack([expected[i][place] for i, place in zip(alive, places, strict=True)])
        torch.testing.assert_close(logits, wanted, rtol=1e-9, atol=1e-9)


def test_rows_beyond_the_kept_ones_may_hold_anything_finite() -> None:
    cache = KVCache(build(None, 2, False).config, 3, 4, DTYPE)
    cache.prefill([1, 2, 3])
    for i, layer in enumerate(cache.layers):
        layer[:, 2, :3] = i + 1.0
    cache.keep([2])
    assert cache.lengths == [3]
    assert all((layer[:, 0, :3] == i + 1.0).all() for i, layer in enumerate(cache.layers))
