"""Tiny random models of transformers, and the logits that this package computes from their files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers.utils import logging

from moeforge.checkpoint import load_model
from moeforge.model import DenseAttention, ForwardContext

logging.disable_progress_bar()
torch.set_num_threads(1)

SIZES = {
    "vocab_size": 67,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}


@pytest.fixture
def tiny() -> Callable[..., Any]:
    """`tiny("Llama", **config)`: a transformers model whose every weight matters, biases and norms too."""

    def make(family: str, **changes: Any) -> Any:
        config = getattr(transformers, f"{family}Config")(**{**SIZES, **changes})
        model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
        rng = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.normal_(std=0.3 if "norm" not in name else 0.1, generator=rng)
                if "norm" in name:
                    parameter.add_(1)
        return model

    return make


@pytest.fixture
def tokens_S() -> Tensor:
    """One sequence, longer than the windows and original lengths of the tests."""
    return torch.randint(3, 67, (40,), generator=torch.Generator().manual_seed(2))


@pytest.fixture
def our_logits(tokens_S: Tensor) -> Callable[..., Tensor]:
    """`our_logits(path_or_model)`: logits [S, V] in float32 of the model loaded from there."""

    def compute(source: Any) -> Tensor:
        model = load_model(source, dtype=torch.float32) if not isinstance(source, torch.nn.Module) else source
        context = ForwardContext(DenseAttention(1, len(tokens_S)))
        with torch.no_grad():
            hidden_TD = model(tokens_S, torch.arange(len(tokens_S)), context)
            return model.logits(hidden_TD, context)

    return compute


@pytest.fixture
def their_logits(tokens_S: Tensor) -> Callable[..., Tensor]:
    """Logits [S, V] of a transformers model."""

    def compute(model: Any) -> Tensor:
        with torch.no_grad():
            return model(tokens_S[None], use_cache=False).logits[0]

    return compute


@pytest.fixture
def saved(tmp_path: Path, tiny: Callable[..., Any]) -> Path:
    """A small untied Llama in one safetensors file."""
    tiny("Llama").save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.fixture
def sharded(tmp_path: Path, tiny: Callable[..., Any]) -> Path:
    """The same in many shards with an index."""
    tiny("Llama").save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    return tmp_path / "sharded"
