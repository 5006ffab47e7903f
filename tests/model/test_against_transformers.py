"""Logits and gradients against transformers' own models, weights carried over by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from moeforge.config.model import ModelConfig

transformers = pytest.importorskip("transformers")

BASE: dict[str, Any] = {
    "vocab_size": 37,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "attn_implementation": "eager",
}
MOE: dict[str, Any] = {"gate_norm": None}

# name: (transformers' class, its config beyond BASE, our config's changes)
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("Llama", {}, {}),
    "llama, many heads": ("Llama", {"num_key_value_heads": 4}, {"num_kv_heads": 4}),
    "llama, one KV head": ("Llama", {"num_key_value_heads": 1}, {"num_kv_heads": 1}),
    "llama, tied": ("Llama", {"tie_word_embeddings": True}, {"tie_embeddings": True}),
    "llama, biases": ("Llama", {"attention_bias": True}, {"qkv_bias": True, "output_bias": True}),
    "llama, wide heads": ("Llama", {"head_dim": 8}, {"head_dim": 8}),
    "mistral": ("Mistral", {"sliding_window": 4, "head_dim": 4}, {"sliding_window": 4}),
    "qwen2": ("Qwen2", {}, {"qkv_bias": True}),
    "qwen3": ("Qwen3", {"head_dim": 4}, {"qk_norm": "head"}),
    "mixtral": (
        "Mixtral",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
        {"moe": MOE | {"expert_size": 32}},
    ),
    "mixtral, window, top-3": (
        "Mixtral",
        {"num_local_experts": 5, "num_experts_per_tok": 3, "sliding_window": 3},
        {"moe": MOE | {"num_experts": 5, "top_k": 3, "expert_size": 32}, "sliding_window": 3},
    ),
    "olmoe": (
        "Olmoe",
        {"num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": False},
        {"moe": MOE | {"expert_size": 32, "renormalize": False}, "qk_norm": "full"},
    ),
}


def fuse(theirs: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Their tensors (weights or gradients) under our names and in our order."""
    g, p, h = config.num_kv_heads, config.heads_per_group, config.head_dim
    ours = {
        "embed.weight": theirs["model.embed_tokens.weight"],
        "head.norm.weight": theirs["model.norm.weight"],
    }
    if not config.tie_embeddings:
        ours["head.weight"] = theirs["lm_head.weight"]
    for i in range(config.num_layers):
        source, layer = f"model.layers.{i}.", f"layers.{i}."
        for kind in ("weight", "bias"):
            parts = [theirs.get(f"{source}self_attn.{x}_proj.{kind}") for x in "qkv"]
            if parts[0] is not None:
                rows = []
                for group in range(g):
                    rows += [parts[0][group * p * h : (group + 1) * p * h]]
                    rows += [part[group * h : (group + 1) * h] for part in parts[1:]]
                ours[f"{layer}attention.qkv.{kind}"] = torch.cat(rows)
            if f"{source}self_attn.o_proj.{kind}" in theirs:
                ours[f"{layer}attention.o.{kind}"] = theirs[f"{source}self_attn.o_proj.{kind}"]
        for x in "qk":
            if f"{source}self_attn.{x}_norm.weight" in theirs:
                ours[f"{layer}attention.{x}_norm.weight"] = theirs[f"{source}self_attn.{x}_norm.weight"]
        ours[f"{layer}attention.norm.weight"] = theirs[f"{source}input_layernorm.weight"]
        ours[f"{layer}ffn.norm.weight"] = theirs[f"{source}post_attention_layernorm.weight"]
        if config.moe is None:
            gate, up = (theirs[f"{source}mlp.{x}_proj.weight"] for x in ("gate", "up"))
            ours[f"{layer}ffn.w13.weight"] = torch.cat([gate, up])
            ours[f"{layer}ffn.w2.weight"] = theirs[f"{source}mlp.down_proj.weight"]
        else:
            ours[f"{layer}ffn.router.weight"] = theirs[f"{source}mlp.gate.weight"]
            ours[f"{layer}ffn.experts.w13"] = theirs[f"{source}mlp.experts.gate_up_proj"]
            ours[f"{layer}ffn.experts.w2"] = theirs[f"{source}mlp.experts.down_proj"]
    return ours


@torch.no_grad()
def their_model(name: str, dtype: torch.dtype) -> Any:
    family, extra, _ = MODELS[name]
    config = getattr(transformers, f"{family}Config")(**(BASE | extra))
    config._experts_implementation = "eager"
    model = getattr(transformers, f"{family}ForCausalLM")(config).to(dtype).eval()
    generator = torch.Generator().manual_seed(0)
    for key, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3
        parameter.copy_(values + ("norm" in key))
    return model


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients(
    name: str,
    dtype: torch.dtype,
    config: Callable[..., ModelConfig],
    build: Callable[..., Any],
    inputs: Callable[..., Any],
    run: Callable[..., Any],
) -> None:
    theirs = their_model(name, dtype)
    shape = config(**MODELS[name][2])
    ours = build(shape, dtype)
    ours.load_state_dict(fuse(dict(theirs.named_parameters()), shape), strict=True)

    tokens, targets = inputs(2, 9)
    expected = theirs(tokens).logits
    hidden, ctx = run(ours, tokens)
    logits = ours.logits(hidden, ctx).view_as(expected)
    # Their norms, rotations and gate are float32 in float64 models too.
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=2e-5)

    loss = torch.nn.functional.cross_entropy(expected.flatten(0, 1), targets.flatten(), reduction="sum")
    loss.backward()
    found = ours.loss(hidden, targets.flatten(), ctx)
    found.backward()
    assert found.item() == pytest.approx(loss.item(), rel=1e-6)
    gradients = fuse({key: p.grad for key, p in theirs.named_parameters()}, shape)
    assert set(gradients) == {key for key, _ in ours.named_parameters()}
    for key, parameter in ours.named_parameters():
        size = float(gradients[key].abs().max())
        torch.testing.assert_close(parameter.grad, gradients[key], rtol=1e-4, atol=2e-5 * size, msg=key)
