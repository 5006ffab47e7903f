"""Small random checkpoints whose sizes are no multiples of a block, and what is computed from them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moeforge.checkpoint import Checkpoint, load_model, open_checkpoint, save_model
from moeforge.config.model import ModelConfig, MoEConfig
from moeforge.model import DenseAttention, ForwardContext, Transformer

MakeCheckpoint = Callable[..., Checkpoint]
MOE = MoEConfig(num_experts=4, top_k=2, expert_size=144)
SIZES: dict[str, Any] = {
    "vocab_size": 67, "hidden_size": 160, "num_layers": 2, "num_heads": 6, "num_kv_heads": 3, "head_dim": 32,
    "ffn_size": 208, "max_positions": 64, "bos_token_id": 1, "eos_token_ids": (2,),
}  # fmt: skip


def random_model(**changes: Any) -> Transformer:
    torch.manual_seed(1)
    model = Transformer(ModelConfig(**{**SIZES, **changes}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.1)
            if "norm.weight" in name or name.endswith("router.scale"):
                parameter.add_(1)
    return model


@pytest.fixture
def make(tmp_path: Path) -> MakeCheckpoint:
    """`make(name, dtype=..., **changes)`: a checkpoint of a random model."""

    def write(name: str = "plain", dtype: torch.dtype = torch.float32, **changes: Any) -> Checkpoint:
        return open_checkpoint(save_model(random_model(**changes), tmp_path / name, dtype=dtype))

    return write


TOKENS = torch.randint(67, (24,), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def logits(source: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    """Logits [24, V] of a model or a checkpoint."""
    model = source if isinstance(source, Transformer) else load_model(source, dtype)
    context = ForwardContext(DenseAttention(1, len(TOKENS)))
    return model.logits(model(TOKENS, torch.arange(len(TOKENS)), context), context)


def distance(found: Tensor, expected: Tensor) -> float:
    """Relative error of the logits of a token, the median: rounding may send a few tokens to other experts."""
    return float(((found - expected).norm(dim=-1) / expected.norm(dim=-1)).median())
