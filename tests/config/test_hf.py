"""config.json: what each family's means, what ours says, and what is refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from moeforge.config.hf import model_config_from_hf, model_config_to_hf, on_disk_form
from moeforge.config.model import ModelConfig, MoEConfig, RopeConfig
from moeforge.errors import UserError

SIZES: dict[str, Any] = {
    "vocab_size": 100, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
    "num_attention_heads": 4,
}  # fmt: skip


def _read(model_type: str, **changes: Any) -> ModelConfig:
    return model_config_from_hf({**SIZES, "num_key_value_heads": 4, "model_type": model_type, **changes})


def _refusal(model_type: str, **changes: Any) -> str:
    with pytest.raises(UserError) as caught:
        _read(model_type, **changes)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("family", ["llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "olmoe"])
def test_an_absent_key_means_what_the_familys_class_takes(family: str) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoConfig.for_model(family)
    sizes = {key: getattr(theirs, key) for key in SIZES}
    ours = model_config_from_hf({**sizes, "model_type": family})
    head_dim = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    eos = theirs.eos_token_id
    assert (ours.num_kv_heads, ours.head_dim, ours.norm_eps, ours.max_positions, ours.rope.theta) == (
        theirs.num_key_value_heads, head_dim, theirs.rms_norm_eps, theirs.max_position_embeddings,
        theirs.rope_parameters["rope_theta"],
    )  # fmt: skip
    assert ours.bos_token_id == theirs.bos_token_id
    assert ours.eos_token_ids == (() if eos is None else (eos,))
    assert ours.sliding_window == getattr(theirs, "sliding_window", None)
    assert ours.tie_embeddings == theirs.tie_word_embeddings
    if ours.moe is not None:
        assert ours.moe.num_experts == theirs.num_experts
        assert ours.moe.top_k == theirs.num_experts_per_tok
        assert ours.moe.renormalize == getattr(theirs, "norm_topk_prob", True)
        assert ours.moe.expert_size == getattr(theirs, "moe_intermediate_size", theirs.intermediate_size)


def test_old_and_new_spellings_mean_the_same() -> None:
    scaling = {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }  # fmt: skip
    old = _read("llama", rope_theta=5e5, rope_scaling={"rope_type": "llama3", **scaling})
    older = _read("llama", rope_theta=5e5, rope_scaling={"type": "llama3", **scaling})
    new = _read("llama", rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **scaling})
    assert old == older == new
    assert new.rope == RopeConfig(
        theta=5e5,
        kind="llama3",
        factor=8.0,
        original_max_positions=64,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
    )


def test_dynamic_scaling_reaches_beyond_its_key() -> None:
    config = _read("llama", max_position_embeddings=64, rope_scaling={"type": "dynamic", "factor": 4.0})
    assert (config.rope.original_max_positions, config.max_positions) == (64, 256)
    assert model_config_to_hf(config)["max_position_embeddings"] == 64


def test_several_end_tokens() -> None:
    assert _read("llama", eos_token_id=[2, 7]).eos_token_ids == (2, 7)
    assert model_config_to_hf(_read("llama", eos_token_id=[2, 7]))["eos_token_id"] == [2, 7]
    assert _read("llama", eos_token_id=None).eos_token_ids == ()


def test_windows() -> None:
    assert _read("mistral", sliding_window=9).window(0) == 9
    assert _read("mistral", sliding_window=None).window(0) is None
    assert _read("llama", sliding_window=9).window(3) is None
    assert _read("qwen2", sliding_window=9).window(3) is None, "only with use_sliding_window"
    half = _read("qwen2", use_sliding_window=True, sliding_window=9, max_window_layers=2)
    assert [half.window(i) for i in range(4)] == [None, None, 9, 9]
    types = ["full_attention", "sliding_attention", "sliding_attention", "sliding_attention"]
    by_type = _read("qwen3", use_sliding_window=True, sliding_window=9, layer_types=types)
    assert [by_type.window(i) for i in range(4)] == [None, 9, 9, 9]
    assert _read("qwen3_moe", use_sliding_window=True, sliding_window=9, max_window_layers=2).window(0) == 9
    message = _refusal("qwen3", use_sliding_window=True, sliding_window=9, layer_types=types[::-1])
    assert "layer_types" in message


SKYWORK_MOE: dict[str, Any] = {
    "num_experts": [16], "moe_expert_interval": 1, "moe_use_skywork_gating": False, "moe_2layer_gate": False,
    "moe_use_logits_norm": True, "moe_gate_norm_std": 1.0, "moe_feature_no_mul_topk": True,
    "max_position_embeddings": 8192, "rope_theta": 10000, "sliding_window": None, "rotary_percent": 1.0,
}  # fmt: skip


@pytest.mark.parametrize("model_type", ["skywork", "skywork_moe"])
def test_skywork_moe(model_type: str) -> None:
    config = _read(model_type, **SKYWORK_MOE)
    assert config.moe == MoEConfig(num_experts=16, top_k=2, expert_size=48, gate_norm=1.0)
    assert config.max_positions == 8192
    assert config.rope == RopeConfig(theta=10000.0)
    plain = _read(model_type, **{**SKYWORK_MOE, "moe_use_logits_norm": False})
    assert plain.moe is not None
    assert plain.moe.gate_norm is None


def test_skywork_13b() -> None:
    config = _read("skywork", max_position_embeddings=131072)
    assert config.moe is None
    assert config.max_positions == 4096, "131072 is no length that it was trained for"
    assert config.rope == RopeConfig(theta=10000.0)
    assert _read("skywork", rope_scaling={"type": "ntk", "factor": 4.0}).rope == RopeConfig(theta=40000.0)


REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "hidden_act = 'gelu'": ("llama", {"hidden_act": "gelu"}),
    "mlp_bias = True": ("llama", {"mlp_bias": True}),
    "clip_qkv = 8.0": ("olmoe", {"clip_qkv": 8.0}),
    "partial_rotary_factor = 0.5": ("llama", {"partial_rotary_factor": 0.5}),
    "partial_rotary_factor = 0.25": ("llama", {"rope_parameters": {"partial_rotary_factor": 0.25}}),
    "rotary_percent = 0.5": ("skywork", {"rotary_percent": 0.5}),
    "n_shared_experts = 1": ("mixtral", {"n_shared_experts": 1}),
    "rope_type = 'longrope'": ("llama", {"rope_scaling": {"rope_type": "longrope", "factor": 4.0}}),
    "rope_type = 'ntk'": ("llama", {"rope_scaling": {"type": "ntk", "factor": 4.0}}),
    "rope_scaling.factor = None": ("llama", {"rope_scaling": {"rope_type": "linear"}}),
    "rope_scaling.truncate = false": (
        "llama",
        {"rope_scaling": {"rope_type": "yarn", "factor": 2, "truncate": False}},
    ),
    "rope_scaling.low_freq_factor": ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 2}}),
    'quantization_config.quant_method = "gptq"': ("llama", {"quantization_config": {"quant_method": "gptq"}}),
    "vocab_size = None": ("llama", {"vocab_size": None}),
    "num_hidden_layers = -1": ("llama", {"num_hidden_layers": -1}),
    "num_kv_heads (3)": ("llama", {"num_key_value_heads": 3}),
    "moe_2layer_gate = True": ("skywork", {**SKYWORK_MOE, "moe_2layer_gate": True}),
    "moe_feature_no_mul_topk = false": ("skywork", {**SKYWORK_MOE, "moe_feature_no_mul_topk": False}),
    "num_experts = [16, 8]": ("skywork", {**SKYWORK_MOE, "num_experts": [16, 8]}),
    "mlp_only_layers = [1]": ("qwen3_moe", {"mlp_only_layers": [1]}),
    "leaves no layer with experts": ("qwen3_moe", {"mlp_only_layers": [0, 1, 2, 3]}),
    "moe.top_k = 9": ("mixtral", {"num_experts_per_tok": 9}),
    "rope_parameters": ("llama", {"rope_parameters": {"full_attention": {"rope_type": "default"}}}),
    "rope_scaling = 'linear'": ("llama", {"rope_scaling": "linear"}),
}


@pytest.mark.parametrize("said", REFUSED)
def test_what_we_cannot_compute_is_refused_by_name(said: str) -> None:
    model_type, changes = REFUSED[said]
    assert said in _refusal(model_type, **changes)


def test_an_unknown_architecture_is_named_beside_the_known() -> None:
    message = _refusal("gpt2", architectures=["GPT2LMHeadModel"])
    assert "GPT2LMHeadModel" in message
    assert "llama, mistral, qwen2" in message
    assert "model_type = ''" in _refusal("")


def test_two_layer_gates_are_seen_in_the_names() -> None:
    names = ["model.layers.0.block_sparse_moe.gate.wg.0.weight"]
    with pytest.raises(UserError, match="two-layer gate"):
        model_config_from_hf({**SIZES, "model_type": "skywork", **SKYWORK_MOE}, names)


BASE = ModelConfig(
    vocab_size=100, hidden_size=32, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=16, ffn_size=48,
    norm_eps=1e-6, max_positions=512, bos_token_id=1, eos_token_ids=(2, 5),
)  # fmt: skip
MOE = MoEConfig(num_experts=4, top_k=2, expert_size=48)
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("llama", {}),
    "tied, scaled": ("llama", {"tie_embeddings": True, "rope": RopeConfig(kind="linear", factor=2.0)}),
    "yarn": (
        "llama",
        {"rope": RopeConfig(kind="yarn", factor=4.0, original_max_positions=128, beta_fast=16.0, attention_factor=1.5)},
    ),
    "dynamic": ("llama", {"rope": RopeConfig(kind="dynamic", factor=4.0, original_max_positions=128)}),
    "biases": ("llama", {"qkv_bias": True, "output_bias": True}),
    "window": ("mistral", {"sliding_window": 9}),
    "window from layer 1": ("moeforge", {"sliding_window": 9, "sliding_window_first_layer": 1}),
    "q/k/v biases": ("qwen2", {"qkv_bias": True}),
    "q/k/v biases, window from layer 1": (
        "qwen2",
        {"qkv_bias": True, "sliding_window": 9, "sliding_window_first_layer": 1},
    ),
    "head norms": ("qwen3", {"qk_norm": "head", "qkv_bias": True, "output_bias": True}),
    "full norms": ("moeforge", {"qk_norm": "full"}),
    "experts": ("mixtral", {"moe": MOE}),
    "experts, window": ("mixtral", {"moe": MOE, "sliding_window": 9}),
    "experts, gate norm": ("moeforge", {"moe": dataclasses.replace(MOE, gate_norm=1.0)}),
    "experts, router bias": ("moeforge", {"moe": dataclasses.replace(MOE, router_bias=True)}),
    "experts, not renormalised": ("moeforge", {"moe": dataclasses.replace(MOE, renormalize=False)}),
    "experts, every second layer": ("moeforge", {"moe": dataclasses.replace(MOE, layer_frequency=2)}),
    "experts, q/k/v biases": ("moeforge", {"moe": MOE, "qkv_bias": True}),
    "experts, head norms": ("qwen3_moe", {"moe": MOE, "qk_norm": "head"}),
    "experts, head norms, every second layer": (
        "qwen3_moe",
        {"moe": dataclasses.replace(MOE, layer_frequency=2, renormalize=False), "qk_norm": "head"},
    ),
    "experts, head norms, gate norm": (
        "moeforge",
        {"moe": dataclasses.replace(MOE, gate_norm=2.0), "qk_norm": "head"},
    ),
}


@pytest.mark.parametrize("case", FORMS)
def test_what_we_write_we_read(case: str) -> None:
    form, changes = FORMS[case]
    config = dataclasses.replace(BASE, **changes, family=form)
    written = model_config_to_hf(config, dtype="float32")
    assert written["model_type"] == on_disk_form(config) == form
    assert model_config_from_hf(written) == config
    assert written["dtype"] == written["torch_dtype"] == "float32"
    if config.moe is not None:
        assert written["num_experts"] == written["num_local_experts"] == config.moe.num_experts


def test_rope_is_always_written_out() -> None:
    """Mixtral's class takes 1e6 where the key is absent, Llama's 1e4."""
    written = model_config_to_hf(dataclasses.replace(BASE, moe=MOE))
    assert written["rope_theta"] == written["rope_parameters"]["rope_theta"] == 10000.0


def test_a_damaged_section_of_our_own_is_one_line() -> None:
    for section in ({}, {"vocab_size": 3, "surprise": 1}, None):
        with pytest.raises(UserError, match="moeforge"):
            model_config_from_hf({"model_type": "moeforge", "moeforge": section})
