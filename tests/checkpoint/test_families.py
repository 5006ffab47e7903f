"""Every family computes what transformers computes from the same files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moeforge.checkpoint.families import canonical_name, disk_name

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "rope_theta": 1e3, "factor": 4.0, "original_max_position_embeddings": 16,
}  # fmt: skip
MOE = {"num_experts": 5, "num_local_experts": 5, "num_experts_per_tok": 2}
WINDOW = {"use_sliding_window": True, "sliding_window": 7}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama, tied": ("Llama", {"tie_word_embeddings": True}),
    "llama, biases": ("Llama", {"attention_bias": True}),
    "llama, one key head, wide heads": ("Llama", {"num_key_value_heads": 1, "head_dim": 16}),
    "llama, as many key heads": ("Llama", {"num_key_value_heads": 4}),
    "llama, llama3 rope": ("Llama", {"rope_parameters": LLAMA3}),
    "llama, linear rope": (
        "Llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    ),
    "llama, dynamic rope": (
        "Llama",
        {
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
            "max_position_embeddings": 16,
        },
    ),
    "llama, yarn rope": ("Llama", {"rope_parameters": YARN}),
    "llama, yarn rope, own factor": (
        "Llama",
        {"rope_parameters": {**YARN, "attention_factor": 0.8, "beta_fast": 8.0, "beta_slow": 2.0}},
    ),
    "llama, yarn rope, mscale": (
        "Llama",
        {"rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.7}},
    ),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral, window": ("Mistral", {"sliding_window": 7}),
    "qwen2": ("Qwen2", {}),
    "qwen2, window from layer 1, tied": (
        "Qwen2",
        {**WINDOW, "max_window_layers": 1, "tie_word_embeddings": True},
    ),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "qwen3, biases, window": (
        "Qwen3",
        {"head_dim": 16, "attention_bias": True, **WINDOW, "max_window_layers": 0},
    ),
    "mixtral": ("Mixtral", MOE),
    "mixtral, window": ("Mixtral", {**MOE, "sliding_window": 7}),
    "qwen3_moe": ("Qwen3Moe", {**MOE, "moe_intermediate_size": 24}),
    "qwen3_moe, renormalised, every second layer, window": (
        "Qwen3Moe",
        {**MOE, "moe_intermediate_size": 24, "norm_topk_prob": True, "decoder_sparse_step": 2, **WINDOW},
    ),
    "qwen3_moe, dense first layer": (
        "Qwen3Moe",
        {**MOE, "moe_intermediate_size": 24, "norm_topk_prob": True, "mlp_only_layers": [0, 2]},
    ),
    "olmoe": ("Olmoe", MOE),
    "olmoe, renormalised": ("Olmoe", {**MOE, "norm_topk_prob": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(
    case: str, tmp_path: Path, tiny: Callable[..., Any], our_logits: Any, their_logits: Any
) -> None:
    family, changes = CASES[case]
    theirs = tiny(family, **changes)
    theirs.save_pretrained(tmp_path / "model", max_shard_size="30KB")
    expected = their_logits(theirs)
    assert expected.std() > 0.5  # a model that says nothing would prove nothing
    torch.testing.assert_close(our_logits(tmp_path / "model"), expected, rtol=0, atol=1e-4)


def test_names_go_to_the_disk_and_back() -> None:
    for canonical, disk in (
        ("model.layers.3.block_sparse_moe.gate.weight", "model.layers.3.mlp.gate.weight"),
        (
            "model.layers.3.block_sparse_moe.experts.12.w1.weight",
            "model.layers.3.mlp.experts.12.gate_proj.weight",
        ),
        (
            "model.layers.3.block_sparse_moe.experts.12.w2.weight",
            "model.layers.3.mlp.experts.12.down_proj.weight",
        ),
        ("model.layers.3.mlp.gate_proj.weight", "model.layers.3.mlp.gate_proj.weight"),
    ):
        assert disk_name(canonical, "qwen3_moe") == disk
        assert canonical_name(disk) == canonical
        assert disk_name(canonical, "mixtral") == canonical
    assert canonical_name("model.layers.0.self_attn.rotary_emb.inv_freq") is None
