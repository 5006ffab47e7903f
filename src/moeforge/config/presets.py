"""Model configurations by name, from the published config.json of each model."""

from __future__ import annotations

import difflib
from dataclasses import replace

from moeforge.config.model import ModelConfig, MoEConfig, RopeConfig
from moeforge.errors import UserError

_SKYWORK_13B = ModelConfig(
    vocab_size=65519,
    hidden_size=4608,
    num_layers=52,
    num_heads=36,
    num_kv_heads=36,
    head_dim=128,
    ffn_size=12288,
    norm_eps=1e-6,
    max_positions=4096,
    family="skywork",
    bos_token_id=1,
    eos_token_ids=(2,),
)
_SMOLLM2_135M = ModelConfig(
    vocab_size=49152,
    hidden_size=576,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    ffn_size=1536,
    rope=RopeConfig(theta=100_000.0),
    max_positions=8192,
    tie_embeddings=True,
    bos_token_id=1,
    eos_token_ids=(2,),
)
_LLAMA_3_8B = ModelConfig(
    vocab_size=128_256,
    hidden_size=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    ffn_size=14336,
    rope=RopeConfig(
        theta=500_000.0,
        kind="llama3",
        factor=8.0,
        original_max_positions=8192,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
    ),
    max_positions=131_072,
    bos_token_id=128_000,
    eos_token_ids=(128_001,),
)
_MISTRAL_7B = ModelConfig(
    vocab_size=32768,
    hidden_size=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    ffn_size=14336,
    rope=RopeConfig(theta=1_000_000.0),
    max_positions=32768,
    family="mistral",
    bos_token_id=1,
    eos_token_ids=(2,),
)

PRESETS: dict[str, ModelConfig] = {
    "skywork-13b": _SKYWORK_13B,
    "skywork-moe": replace(
        _SKYWORK_13B,
        vocab_size=65532,
        max_positions=8192,
        moe=MoEConfig(num_experts=16, top_k=2, expert_size=12288, gate_norm=1.0),
        family="skywork_moe",
    ),
    "smollm2-135m": _SMOLLM2_135M,
    "smollm2-360m": replace(_SMOLLM2_135M, hidden_size=960, num_layers=32, num_heads=15, num_kv_heads=5, ffn_size=2560),
    "smollm2-1.7b": replace(
        _SMOLLM2_135M,
        hidden_size=2048,
        num_layers=24,
        num_heads=32,
        num_kv_heads=32,
        ffn_size=8192,
        rope=RopeConfig(theta=130_000.0),
    ),
    "llama-3.1-8b": _LLAMA_3_8B,
    "llama-3.2-1b": replace(
        _LLAMA_3_8B,
        hidden_size=2048,
        num_layers=16,
        head_dim=64,
        ffn_size=8192,
        rope=replace(_LLAMA_3_8B.rope, factor=32.0),
        tie_embeddings=True,
    ),
    "mistral-7b-v0.3": _MISTRAL_7B,
    "qwen2.5-0.5b": ModelConfig(
        vocab_size=151_936,
        hidden_size=896,
        num_layers=24,
        num_heads=14,
        num_kv_heads=2,
        head_dim=64,
        ffn_size=4864,
        norm_eps=1e-6,
        rope=RopeConfig(theta=1_000_000.0),
        max_positions=32768,
        tie_embeddings=True,
        qkv_bias=True,
        family="qwen2",
        bos_token_id=151_643,
        eos_token_ids=(151_643,),
    ),
    "qwen3-0.6b": ModelConfig(
        vocab_size=151_936,
        hidden_size=1024,
        num_layers=28,
        num_heads=16,
        num_kv_heads=8,
        head_dim=128,
        ffn_size=3072,
        norm_eps=1e-6,
        rope=RopeConfig(theta=1_000_000.0),
        max_positions=40960,
        tie_embeddings=True,
        qk_norm="head",
        family="qwen3",
        bos_token_id=151_643,
        eos_token_ids=(151_645,),
    ),
    "mixtral-8x7b": replace(
        _MISTRAL_7B,
        vocab_size=32000,
        moe=MoEConfig(num_experts=8, top_k=2, expert_size=14336),
        family="mixtral",
    ),
    "qwen3-30b-a3b": ModelConfig(
        vocab_size=151_936,
        hidden_size=2048,
        num_layers=48,
        num_heads=32,
        num_kv_heads=4,
        head_dim=128,
        ffn_size=6144,
        norm_eps=1e-6,
        rope=RopeConfig(theta=1_000_000.0),
        max_positions=40960,
        qk_norm="head",
        moe=MoEConfig(num_experts=128, top_k=8, expert_size=768),
        family="qwen3_moe",
        bos_token_id=151_643,
        eos_token_ids=(151_645,),
    ),
    "olmoe-1b-7b": ModelConfig(
        vocab_size=50304,
        hidden_size=2048,
        num_layers=16,
        num_heads=16,
        num_kv_heads=16,
        head_dim=128,
        ffn_size=1024,
        max_positions=4096,
        qk_norm="full",
        moe=MoEConfig(num_experts=64, top_k=8, expert_size=1024, renormalize=False),
        family="olmoe",
        eos_token_ids=(50279,),
    ),
}

HUB_IDS = {
    "skywork-13b": "Skywork/Skywork-13B-base",
    "skywork-moe": "Skywork/Skywork-MoE-Base",
    "smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "smollm2-360m": "HuggingFaceTB/SmolLM2-360M-Instruct",
    "smollm2-1.7b": "HuggingFaceTB/SmolLM2-1.7B-Instruct",
    "llama-3.1-8b": "meta-llama/Llama-3.1-8B",
    "llama-3.2-1b": "meta-llama/Llama-3.2-1B",
    "mistral-7b-v0.3": "mistralai/Mistral-7B-v0.3",
    "qwen2.5-0.5b": "Qwen/Qwen2.5-0.5B",
    "qwen3-0.6b": "Qwen/Qwen3-0.6B",
    "mixtral-8x7b": "mistralai/Mixtral-8x7B-v0.1",
    "qwen3-30b-a3b": "Qwen/Qwen3-30B-A3B",
    "olmoe-1b-7b": "allenai/OLMoE-1B-7B-0924",
}
"""Where the weights of each preset are published on the Hugging Face hub."""


def model_preset(name: str) -> ModelConfig:
    """The configuration of a named model; raises UserError with the nearest name and all of them."""
    if name in PRESETS:
        return PRESETS[name]
    nearest = difflib.get_close_matches(name.lower(), PRESETS, 1, cutoff=0)[0]
    raise UserError(f'model preset "{name}": unknown; did you mean {nearest}? The presets are {", ".join(PRESETS)}')
