"""Rotary embeddings in Hugging Face's config.json: `rope_theta`, `rope_scaling` and `rope_parameters`."""

from __future__ import annotations

import math
from typing import Any

from moeforge.config.model import RopeConfig
from moeforge.errors import UserError

HFConfig = dict[str, Any]


def rope_from_hf(family: str, hf: HFConfig, positions: int) -> tuple[RopeConfig, int]:
    """(rotary configuration, longest position accepted); `positions` is max_position_embeddings."""
    key = "rope_parameters" if hf.get("rope_parameters") else "rope_scaling"
    scaling = hf.get(key) or {}
    if not isinstance(scaling, dict) or any(isinstance(value, dict) for value in scaling.values()):
        raise UserError(f"config.json: {key} = {scaling!r}: must be one mapping for all layers")
    theta = float(scaling.get("rope_theta") or hf["rope_theta"] or 1e4)
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if scaling.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(
            f"config.json: partial_rotary_factor = {scaling['partial_rotary_factor']} is not supported; only 1.0"
        )
    if family == "skywork" and positions == 131072 and not scaling:
        positions = 4096  # early revisions carry 131072, which no Skywork-13B was trained for (formats.md 1)
    if kind == "default":
        return RopeConfig(theta=theta), positions
    factor = scaling.get("factor")
    original = scaling.get("original_max_position_embeddings")
    original = int(original or hf.get("original_max_position_embeddings") or positions)
    if factor is None and kind == "yarn":
        factor = positions / original
    factor = _number({"factor": factor}, "factor", at_least=1.0)
    if kind == "ntk" and family.startswith("skywork"):  # Skywork's own kind: a static change of the base
        return RopeConfig(theta=theta * factor), positions
    if kind == "linear":
        return RopeConfig(theta=theta, kind="linear", factor=factor), positions
    if kind == "dynamic":
        rope = RopeConfig(theta=theta, kind="dynamic", factor=factor, original_max_positions=positions)
        return rope, int(positions * factor)
    if kind == "llama3":
        return RopeConfig(
            theta=theta,
            kind="llama3",
            factor=factor,
            original_max_positions=original,
            low_freq_factor=_number(scaling, "low_freq_factor"),
            high_freq_factor=_number(scaling, "high_freq_factor"),
        ), positions
    if kind == "yarn" and scaling.get("truncate", True):
        return RopeConfig(
            theta=theta,
            kind="yarn",
            factor=factor,
            original_max_positions=original,
            beta_fast=float(scaling.get("beta_fast") or 32),
            beta_slow=float(scaling.get("beta_slow") or 1),
            attention_factor=_yarn_attention_factor(scaling, factor),
        ), positions
    what = "rope_scaling.truncate = false" if kind == "yarn" else f"rope_scaling.rope_type = {kind!r}"
    raise UserError(f"config.json: {what} is not supported; only default, linear, dynamic, llama3 and yarn")


def _number(scaling: HFConfig, key: str, at_least: float = 0.0) -> float:
    value = scaling.get(key)
    if not isinstance(value, int | float) or value < at_least:
        raise UserError(f"config.json: rope_scaling.{key} = {value}: must be a number of at least {at_least:g}")
    return float(value)


def _yarn_attention_factor(scaling: HFConfig, factor: float) -> float | None:
    """Factor on cos and sin; None leaves YaRN's own 0.1 ln(factor) + 1 (arXiv 2309.00071, equation 22)."""
    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])
    mscale, all_dim = scaling.get("mscale"), scaling.get("mscale_all_dim")
    if not (mscale and all_dim):
        return None
    return (0.1 * mscale * math.log(factor) + 1) / (0.1 * all_dim * math.log(factor) + 1)


def rope_scaling_to_hf(rope: RopeConfig) -> HFConfig:
    """The scaling keys, `rope_type` among them; empty for plain rotary embeddings."""
    if rope.kind == "default":
        return {}
    data: HFConfig = {"rope_type": rope.kind, "type": rope.kind, "factor": rope.factor}
    if rope.kind in ("llama3", "yarn"):
        data["original_max_position_embeddings"] = rope.original_max_positions
    if rope.kind == "llama3":
        data |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    if rope.kind == "yarn":
        data |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow}
        if rope.attention_factor is not None:
            data["attention_factor"] = rope.attention_factor
    return data
