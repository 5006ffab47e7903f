"""What a family calls its weights on disk, to and from the canonical names.

Llama, Mistral, Qwen2, Qwen3, Skywork-13B, Mixtral, Skywork-MoE and our own form use the canonical names as
they are. To add a family: its config in config/hf.py, its renames here, its logits in test_families.py.
"""

from __future__ import annotations

import re

# Names of scales of FP8 weights: `weight_scale_inv` is what blocks have (and to be multiplied by, all the same),
# `act_scale` is older.
_SCALES = {".weight_scale_inv": ".weight_scale", ".act_scale": ".input_scale"}
_KIND = r"\.(weight|weight_scale|input_scale)$"
# Qwen3-MoE and OLMoE name experts after the dense projections, and their gate sits under `mlp`.
_EXPERT = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
_EXPERT_ON_DISK = {canonical: disk for disk, canonical in _EXPERT.items()}
_FROM_DISK = re.compile(r"^(model\.layers\.\d+)\.mlp\.(?:(gate)|experts\.(\d+)\.(gate_proj|up_proj|down_proj))" + _KIND)
_TO_DISK = re.compile(r"^(model\.layers\.\d+)\.block_sparse_moe\.(?:(gate)|experts\.(\d+)\.(w[123]))" + _KIND)
_MLP_STYLE = ("qwen3_moe", "olmoe")


def canonical_name(disk_name: str) -> str | None:
    """The canonical name, or None for what is no weight (old Llama files' `rotary_emb.inv_freq`)."""
    if disk_name.endswith("rotary_emb.inv_freq"):
        return None
    for theirs, ours in _SCALES.items():
        if disk_name.endswith(theirs):
            disk_name = disk_name.removesuffix(theirs) + ours
    if not (match := _FROM_DISK.match(disk_name)):
        return disk_name
    layer, gate, expert, part, kind = match.groups()
    block = f"{layer}.block_sparse_moe"
    return f"{block}.gate.{kind}" if gate else f"{block}.experts.{expert}.{_EXPERT[part]}.{kind}"


def disk_name(canonical: str, form: str, block_scales: bool = False) -> str:
    """What a checkpoint of this form (`config.hf.on_disk_form`) calls a canonical name."""
    if block_scales and canonical.endswith(".weight_scale"):
        return disk_name(canonical, form) + "_inv"
    if form not in _MLP_STYLE or not (match := _TO_DISK.match(canonical)):
        return canonical
    layer, gate, expert, part, kind = match.groups()
    return f"{layer}.mlp.gate.{kind}" if gate else f"{layer}.mlp.experts.{expert}.{_EXPERT_ON_DISK[part]}.{kind}"
