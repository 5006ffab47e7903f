"""Small random models, and one way to run them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from moeforge.config.model import ModelConfig, MoEConfig
from moeforge.model import DenseAttention, ForwardContext, Transformer


def make_config(moe: dict[str, Any] | None = None, **changes: Any) -> ModelConfig:
    """Two layers, 2 KV groups of 2 heads; `moe` overrides 4 experts top-2 with gate normalisation."""
    values: dict[str, Any] = {
        "vocab_size": 37,
        "hidden_size": 16,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 4,
        "ffn_size": 32,
        "max_positions": 64,
    }
    if moe is not None:
        values["moe"] = MoEConfig(**({"num_experts": 4, "top_k": 2, "expert_size": 16, "gate_norm": 1.0} | moe))
    return ModelConfig(**(values | changes))


@torch.no_grad()
def make_model(config: ModelConfig, dtype: torch.dtype = torch.float64, seed: int = 0, **slice_: Any) -> Transformer:
    """Every parameter random, norms and biases too, at a scale where attention and gates are not flat."""
    model = Transformer(config, **slice_)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3
        if "norm.weight" in name or name.endswith("scale"):
            values += 1
        parameter.copy_(values)
    return model.to(dtype)


def make_inputs(sequences: int, positions: int, vocab: int = 37, seed: int = 0) -> tuple[Tensor, Tensor]:
    """tokens and targets, each [B, S]."""
    generator = torch.Generator().manual_seed(seed)
    tokens, targets = torch.randint(vocab, (2, sequences, positions), generator=generator)
    return tokens, targets


def run_model(
    model: Transformer, tokens_BS: Tensor, documents_BS: Tensor | None = None, **context: Any
) -> tuple[Tensor, ForwardContext]:
    """hidden_TD and the context it was computed in; positions restart at each document."""
    b, s = tokens_BS.shape
    positions = torch.arange(s).expand(b, s).clone()
    if documents_BS is not None:
        for row in range(b):
            for i in range(1, s):
                same = documents_BS[row, i] == documents_BS[row, i - 1]
                positions[row, i] = positions[row, i - 1] + 1 if same else 0
    context.setdefault("attention", DenseAttention(b, s, documents_BS))
    forward = ForwardContext(**context)
    return model(tokens_BS.flatten(), positions.flatten(), forward), forward


@pytest.fixture(scope="session")
def config() -> Callable[..., ModelConfig]:
    return make_config


@pytest.fixture(scope="session")
def build() -> Callable[..., Transformer]:
    return make_model


@pytest.fixture(scope="session")
def inputs() -> Callable[..., tuple[Tensor, Tensor]]:
    return make_inputs


@pytest.fixture(scope="session")
def run() -> Callable[..., tuple[Tensor, ForwardContext]]:
    return run_model
