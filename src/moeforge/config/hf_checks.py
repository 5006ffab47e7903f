"""What config.json may say: values of the right kind, and nothing that this package would compute differently."""

from __future__ import annotations

from typing import Any

from moeforge.errors import UserError

HFConfig = dict[str, Any]

_WHOLE = (
    "num_key_value_heads", "head_dim", "num_experts_per_tok", "num_local_experts", "moe_intermediate_size",
    "sliding_window", "max_window_layers", "decoder_sparse_step", "moe_expert_interval", "bos_token_id",
)  # fmt: skip
_POSITIVE = ("rms_norm_eps", "rope_theta")


def check_values(hf: HFConfig) -> None:
    """Raise UserError for a value of the wrong kind. null is left to who reads the key."""

    def require(key: str, right: bool, allowed: str, null: bool = True) -> None:
        if not right and not (null and hf.get(key) is None):
            raise UserError(f"config.json: {key} = {hf[key]}: must be {allowed}")

    for key in _WHOLE:
        require(key, _is_whole(hf.get(key)), "a whole number of at least 0")
    for key in _POSITIVE:
        value = hf.get(key)
        require(key, isinstance(value, int | float) and value > 0, "a positive number", null=key == "rope_theta")
    for key, allowed in (("eos_token_id", "a token id or a list of them"), ("num_experts", "a whole number")):
        value = hf.get(key)
        require(key, all(map(_is_whole, value if isinstance(value, list) else [value])), allowed)
    for key, kind, allowed in (
        ("mlp_only_layers", list, "a list of layers"),
        ("layer_types", list, "a list of names"),
    ):
        require(key, isinstance(hf.get(key), kind), allowed)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def refuse_unsupported(hf: HFConfig) -> None:
    """Raise UserError naming the first feature that this package does not compute."""

    def refuse(key: str, allowed: str) -> None:
        raise UserError(f"config.json: {key} = {hf[key]!r} is not supported; only {allowed}")

    if hf.get("hidden_act", "silu") not in ("silu", "swish"):
        refuse("hidden_act", '"silu"')
    for key in ("mlp_bias", "moe_2layer_gate"):
        if hf.get(key):
            refuse(key, "false")
    for key in ("clip_qkv", "n_shared_experts", "num_shared_experts", "shared_expert_intermediate_size"):
        if hf.get(key):
            refuse(key, "null")
    for key in ("partial_rotary_factor", "rotary_percent", "rotary_pct"):
        if hf.get(key, 1.0) not in (None, 1.0):
            refuse(key, "1.0 (rotary over the whole head)")
