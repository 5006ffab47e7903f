"""Between Hugging Face's config.json and `ModelConfig`. Plain dictionaries, no torch.

Both spellings are read: `rope_theta`, `rope_scaling` (transformers 4) and `rope_parameters` (5). An
absent key means what the family's own configuration class takes for it. Whatever this package would compute
differently is refused by name, never ignored.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable
from typing import Any

from moeforge.config.hf_checks import check_values, refuse_unsupported
from moeforge.config.hf_quantization import quantization_from_hf, quantization_to_hf
from moeforge.config.hf_rope import rope_from_hf, rope_scaling_to_hf
from moeforge.config.model import ModelConfig, MoEConfig, QKNorm
from moeforge.errors import UserError

HFConfig = dict[str, Any]

FAMILIES = (
    "llama", "mistral", "qwen2", "qwen3", "skywork", "skywork_moe", "mixtral", "qwen3_moe", "olmoe",
    "moeforge",
)  # fmt: skip

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM", "mixtral": "MixtralForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM",
    "moeforge": "MoeforgeForCausalLM",
}  # fmt: skip

_QK_NORMS: dict[str, QKNorm] = {"qwen3": "head", "qwen3_moe": "head", "olmoe": "full"}
_COMMON: HFConfig = {"rms_norm_eps": 1e-6, "rope_theta": 1e4, "bos_token_id": None, "eos_token_id": None}
_LLAMA: HFConfig = {"bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 2048}
_QWEN: HFConfig = {"max_position_embeddings": 32768, "sliding_window": 4096, "num_key_value_heads": 32}
_DEFAULTS: dict[str, HFConfig] = {
    "llama": _LLAMA,
    "mistral": {
        **_LLAMA, "max_position_embeddings": 131072, "sliding_window": 4096, "num_key_value_heads": 8,
    },
    "mixtral": {
        **_LLAMA, "max_position_embeddings": 131072, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
        "rope_theta": 1e6, "num_experts_per_tok": 2, "num_local_experts": 8,
    },
    "qwen2": {**_QWEN, "max_window_layers": 28},
    "qwen3": {**_QWEN, "max_window_layers": 28, "head_dim": 128},
    "qwen3_moe": {
        **_QWEN, "num_key_value_heads": 4, "moe_intermediate_size": 768, "num_experts_per_tok": 8,
        "num_experts": 128,
    },
    "olmoe": {
        "rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "eos_token_id": 50279,
        "num_experts_per_tok": 8, "num_experts": 64,
    },
    "skywork": {**_LLAMA, "max_position_embeddings": 4096},
    "skywork_moe": {**_LLAMA, "max_position_embeddings": 8192},
}  # fmt: skip


def model_config_from_hf(data: HFConfig, names: Collection[str] = ()) -> ModelConfig:
    """The `ModelConfig` that computes what this config.json describes.

    `names`, the checkpoint's tensor names where they are known, settle what older configs leave open.
    Raises UserError for an unknown architecture or a feature that this package does not compute.
    """
    family = _family(data)
    config = _from_own(data) if family == "moeforge" else _from_family(family, data, names)
    quantization = quantization_from_hf(data.get("quantization_config"), config, names)
    return dataclasses.replace(config, quantization=quantization)


def _from_family(family: str, data: HFConfig, names: Collection[str]) -> ModelConfig:
    hf = {**_COMMON, **_DEFAULTS[family], **data}
    check_values(hf)
    refuse_unsupported(hf)
    heads, hidden = _size(hf, "num_attention_heads"), _size(hf, "hidden_size")
    window, first_window_layer = _sliding_window(family, hf)
    rope, max_positions = rope_from_hf(family, hf, _size(hf, "max_position_embeddings"))
    return ModelConfig(
        vocab_size=_size(hf, "vocab_size"),
        hidden_size=hidden,
        num_layers=_size(hf, "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=hf.get("num_key_value_heads") or heads,
        head_dim=int(hf.get("head_dim") or hidden // heads),
        ffn_size=_size(hf, "intermediate_size"),
        norm_eps=float(hf["rms_norm_eps"]),
        rope=rope,
        max_positions=max_positions,
        tie_embeddings=bool(hf.get("tie_word_embeddings")),
        qkv_bias=bool(hf.get("attention_bias")) or family == "qwen2",
        output_bias=bool(hf.get("attention_bias")) and family != "qwen2",
        qk_norm=_QK_NORMS.get(family, "none"),
        sliding_window=window,
        sliding_window_first_layer=first_window_layer,
        moe=_moe(family, hf, names),
        family=family,
        bos_token_id=hf["bos_token_id"],
        eos_token_ids=_token_ids(hf["eos_token_id"]),
    )


def on_disk_form(config: ModelConfig) -> str:
    """The `model_type` under which other engines read this model, or "moeforge" where none computes it."""
    moe, c = config.moe, config
    all_windowed = c.sliding_window is None or c.sliding_window_first_layer == 0
    plain = not c.qkv_bias and not c.output_bias
    if moe is None:
        if plain and c.qk_norm == "none" and all_windowed:
            return "llama" if c.sliding_window is None else "mistral"
        if c.qkv_bias == c.output_bias and c.qk_norm == "head":
            return "qwen3"
        if c.qkv_bias and c.qk_norm == "none" and (not c.output_bias or c.sliding_window is None):
            return "llama" if c.output_bias else "qwen2"
        return "moeforge"
    if moe.gate_norm is not None or moe.router_bias or not plain or not all_windowed:
        return "moeforge"
    if c.qk_norm == "none" and moe.renormalize and moe.layer_frequency == 1:
        return "mixtral"
    return "qwen3_moe" if c.qk_norm == "head" else "moeforge"


def model_config_to_hf(config: ModelConfig, dtype: str = "bfloat16", unquantized: Iterable[str] = ()) -> HFConfig:
    """config.json of this model in its `on_disk_form`, with the keys of transformers 4 and 5 side by side.

    `unquantized`: modules of a quantised model that are not, by their names on disk.
    """
    c, form = config, on_disk_form(config)
    eos, scaling = list(c.eos_token_ids), rope_scaling_to_hf(c.rope)
    dynamic = c.rope.kind == "dynamic"
    data: HFConfig = {
        "architectures": [_ARCHITECTURES[form]],
        "model_type": form,
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "intermediate_size": c.ffn_size,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": c.norm_eps,
        # For the dynamic kind, Hugging Face's key means the length from which the scaling starts.
        "max_position_embeddings": c.rope.original_max_positions if dynamic else c.max_positions,
        "rope_theta": c.rope.theta,
        "rope_parameters": {"rope_type": "default", **scaling, "rope_theta": c.rope.theta},
        "attention_bias": c.qkv_bias and form != "qwen2",
        "tie_word_embeddings": c.tie_embeddings,
        "bos_token_id": c.bos_token_id,
        "eos_token_id": eos if len(eos) > 1 else (eos[0] if eos else None),
        "dtype": dtype,
        "torch_dtype": dtype,
    }
    if scaling:  # transformers 4 reads this key; 5 warns of it, so that it is only there where it says something
        data["rope_scaling"] = scaling
    if form in ("mistral", "mixtral", "moeforge"):
        data["sliding_window"] = c.sliding_window
    elif form.startswith("qwen"):
        data["use_sliding_window"] = c.sliding_window is not None
        data["sliding_window"] = c.sliding_window
        if form != "qwen3_moe":
            data["max_window_layers"] = c.sliding_window_first_layer if c.sliding_window else c.num_layers
    if c.moe is not None:
        data["num_experts"] = data["num_local_experts"] = c.moe.num_experts
        data["num_experts_per_tok"] = c.moe.top_k
        data["norm_topk_prob"] = c.moe.renormalize
        data["router_aux_loss_coef"] = 0.001
        if form == "qwen3_moe":
            data["decoder_sparse_step"] = 1
            data["mlp_only_layers"] = [i for i in range(c.num_layers) if not c.is_moe_layer(i)]
            data["moe_intermediate_size"] = c.moe.expert_size
        else:
            data["intermediate_size"] = c.moe.expert_size
    if c.quantization is not None:
        data["quantization_config"] = quantization_to_hf(c.quantization, unquantized)
    if form == "moeforge":
        data["moeforge"] = c.to_dict()
        del data["moeforge"]["quantization"]
    return data


def _family(data: HFConfig) -> str:
    model_type = str(data.get("model_type", ""))
    if model_type not in FAMILIES:
        architecture = (data.get("architectures") or [model_type or "none"])[0]
        raise UserError(
            f"config.json: model_type = {model_type!r} (architecture {architecture}) is not supported; "
            f"supported are {', '.join(FAMILIES)}"
        )
    # Dense Skywork-13B and older Skywork-MoE revisions carry the same model_type and architecture.
    if model_type in ("skywork", "skywork_moe"):
        return "skywork_moe" if data.get("num_experts") else "skywork"
    return model_type


def _from_own(data: HFConfig) -> ModelConfig:
    try:
        return ModelConfig.from_dict(data["moeforge"])
    except KeyError:
        raise UserError("config.json: moeforge: missing; it must describe a model of this model_type") from None
    except UserError as error:
        raise UserError(f"config.json: moeforge: {error}") from None


def _size(hf: HFConfig, key: str) -> int:
    value = hf.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"config.json: {key} = {value}: must be a positive whole number")
    return value


def _token_ids(value: int | list[int] | None) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (value,)


def _moe(family: str, hf: HFConfig, names: Iterable[str]) -> MoEConfig | None:
    if family == "mixtral":
        return MoEConfig(_size(hf, "num_local_experts"), _size(hf, "num_experts_per_tok"), hf["intermediate_size"])
    if family in ("qwen3_moe", "olmoe"):
        # transformers 5 saves Qwen3-MoE's expert count under the other name; original files say num_experts.
        count = "num_local_experts" if "num_local_experts" in hf else "num_experts"
        width = "moe_intermediate_size" if family == "qwen3_moe" else "intermediate_size"
        return MoEConfig(
            _size(hf, count),
            _size(hf, "num_experts_per_tok"),
            _size(hf, width),
            renormalize=bool(hf.get("norm_topk_prob", False)),
            layer_frequency=_layer_frequency(hf),
        )
    return _skywork_moe(hf, names) if family == "skywork_moe" else None


def _layer_frequency(hf: HFConfig) -> int:
    layers = _size(hf, "num_hidden_layers")
    step = int(hf.get("decoder_sparse_step") or 1)
    dense = set(hf.get("mlp_only_layers") or ())
    sparse = [i for i in range(layers) if (i + 1) % step == 0 and i not in dense]
    if not sparse:
        raise UserError(f"config.json: mlp_only_layers = {sorted(dense)} leaves no layer with experts")
    frequency = sparse[0] + 1
    if sparse != list(range(frequency - 1, layers, frequency)):
        raise UserError(
            f"config.json: mlp_only_layers = {sorted(dense)} with decoder_sparse_step = {step} is not "
            "supported; only experts in every n-th layer"
        )
    return frequency


def _skywork_moe(hf: HFConfig, names: Iterable[str]) -> MoEConfig:
    """Skywork-MoE's gate: softmax over z / std(z) (reference/formats.md 2.3); top-2 is fixed in its code."""
    counts = hf["num_experts"] if isinstance(hf["num_experts"], list) else [hf["num_experts"]]
    if len(set(counts)) != 1:
        raise UserError(f"config.json: num_experts = {counts} is not supported; only one count for all layers")
    if any(".gate.wg" in name for name in names):
        raise UserError("gate.wg: a two-layer gate (moe_2layer_gate) is not supported; only gate.weight")
    mixtral_gating = hf.get("moe_use_skywork_gating") or hf.get("moe_use_mixtral_gating")
    if not mixtral_gating and not hf.get("moe_feature_no_mul_topk"):
        raise UserError(
            "config.json: moe_feature_no_mul_topk = false multiplies the experts' inputs by 2, which is not "
            "supported; only true, or moe_use_skywork_gating = true"
        )
    return MoEConfig(
        int(counts[0]),
        int(hf.get("num_experts_per_tok") or 2),
        _size(hf, "intermediate_size"),
        gate_norm=float(hf.get("moe_gate_norm_std") or 1.0) if hf.get("moe_use_logits_norm") else None,
        layer_frequency=int(hf.get("moe_expert_interval") or 1),
    )


def _sliding_window(family: str, hf: HFConfig) -> tuple[int | None, int]:
    """(window in positions, first layer that has it)."""
    window = hf.get("sliding_window")
    if family.startswith("qwen") and not hf.get("use_sliding_window", False):
        window = None
    if family not in ("mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe") or window is None:
        return None, 0
    layers = _size(hf, "num_hidden_layers")
    first = min(int(hf.get("max_window_layers", 0)), layers) if family in ("qwen2", "qwen3") else 0
    if family in ("qwen2", "qwen3") and (types := hf.get("layer_types")):
        first = types.index("sliding_attention") if "sliding_attention" in types else layers
        if types != ["full_attention"] * first + ["sliding_attention"] * (layers - first):
            raise UserError(
                f"config.json: layer_types = {types} is not supported; only full_attention layers followed "
                "by sliding_attention layers"
            )
    return (int(window), first) if first < layers else (None, 0)
