"""A small random model of every family, and the parts of it that the ranks of a layout hold."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moeforge.config.model import ModelConfig, MoEConfig
from moeforge.layout import Layout
from moeforge.model import DenseAttention, ForwardContext, Transformer
from moeforge.parallel.parameters import parameter_parts

BASE: dict[str, Any] = {
    "vocab_size": 37,
    "hidden_size": 32,
    "num_layers": 3,
    "num_heads": 6,
    "num_kv_heads": 3,
    "head_dim": 8,
    "ffn_size": 80,
    "max_positions": 64,
}
MOE: dict[str, Any] = {"num_experts": 5, "top_k": 2, "expert_size": 48}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama, tied": {"tie_embeddings": True},
    "llama, biases": {"qkv_bias": True, "output_bias": True},
    "mistral": {"sliding_window": 4},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": "head"},
    "olmoe": {"qk_norm": "full", "moe": MOE | {"renormalize": False}},
    "mixtral": {"moe": MOE},
    "qwen3-moe": {"qk_norm": "head", "moe": MOE},
    "ours": {"moe": MOE | {"gate_norm": 1.0, "router_bias": True, "layer_frequency": 2}},
}


def family(name: str) -> ModelConfig:
    changes = dict(FAMILIES[name])
    if "moe" in changes:
        changes["moe"] = MoEConfig(**changes["moe"])
    return ModelConfig(**(BASE | changes))


@torch.no_grad()
def random_model(config: ModelConfig, dtype: torch.dtype = torch.float64, seed: int = 0) -> Transformer:
    """Every parameter random, norms and biases too, at a scale where attention and gates are not flat."""
    model = Transformer(config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3
        parameter.copy_(values + ("norm.weight" in name or name.endswith("scale")))
    return model.to(dtype).eval().requires_grad_(False)


def cut(whole: Transformer, layout: Layout, rank: int) -> Transformer:
    """What a rank holds of a whole model."""
    part = Transformer(whole.config, layout, rank=rank, expert_rank=rank)
    state = whole.state_dict()
    parts = parameter_parts(whole.config, layout, 0, rank, rank)
    part.load_state_dict({name: p.cut(state[name]).clone() for name, p in parts.items()}, assign=True)
    return part.eval().requires_grad_(False)


def random_inputs(config: ModelConfig, sequences: int = 2, positions: int = 9) -> tuple[Tensor, Tensor]:
    """Tokens and their positions, both flat."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(config.vocab_size, (sequences * positions,), generator=generator)
    return tokens, torch.arange(positions).repeat(sequences)


@torch.inference_mode()
def logits_of(model: Transformer, tokens_T: Tensor, positions_T: Tensor, **context: Any) -> Tensor:
    """Logits of all tokens of whole sequences."""
    positions = int(positions_T.max()) + 1
    forward = ForwardContext(DenseAttention(len(tokens_T) // positions, positions), **context)
    return model.logits(model(tokens_T, positions_T, forward), forward)
