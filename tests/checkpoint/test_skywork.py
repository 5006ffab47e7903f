"""Skywork's own layouts, made by hand: no library here can write them."""

from __future__ import annotations

import json
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moeforge.checkpoint import open_checkpoint

Tiny = Callable[..., Any]


def _config(**changes: Any) -> dict[str, Any]:
    return {
        "architectures": ["SkyworkForCausalLM"], "model_type": "skywork", "vocab_size": 67, "hidden_size": 32,
        "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4,
        "max_position_embeddings": 131072, "rms_norm_eps": 1e-6, "hidden_act": "silu", "bos_token_id": 1,
        "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "transformers_version": "4.33.1", **changes,
    }  # fmt: skip


def write_bin_shards(directory: Path, state: dict[str, Tensor], config: dict[str, Any], shards: int = 3) -> None:
    """`pytorch_model-0000i-of-0000n.bin` with an index, as PyTorch-era checkpoints are."""
    directory.mkdir()
    names = list(state)
    weight_map: dict[str, str] = {}
    for i in range(shards):
        file = f"pytorch_model-{i + 1:05d}-of-{shards:05d}.bin"
        part = {name: state[name].clone() for name in names[i::shards]}
        torch.save(part, directory / file)
        weight_map.update(dict.fromkeys(part, file))
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    (directory / "config.json").write_text(json.dumps(config))


@pytest.fixture
def llama(tiny: Tiny) -> Any:
    return tiny("Llama", num_key_value_heads=4, rms_norm_eps=1e-6)


def test_skywork_13b(tmp_path: Path, llama: Any, our_logits: Any, their_logits: Any) -> None:
    state = dict(llama.state_dict())
    for i in range(3):  # files of that time carry this buffer
        state[f"model.layers.{i}.self_attn.rotary_emb.inv_freq"] = torch.rand(4)
    write_bin_shards(tmp_path / "sky", state, _config())
    checkpoint = open_checkpoint(tmp_path / "sky")
    assert checkpoint.config.rope.theta == 10000.0
    assert checkpoint.config.max_positions == 4096
    torch.testing.assert_close(our_logits(checkpoint), their_logits(llama), rtol=0, atol=1e-4)


def test_skywork_ntk_scales_the_base(tmp_path: Path, tiny: Tiny, our_logits: Any, their_logits: Any) -> None:
    llama = tiny(
        "Llama",
        num_key_value_heads=4,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 4e4},
    )
    config = _config(rope_scaling={"type": "ntk", "factor": 4.0}, max_position_embeddings=4096)
    write_bin_shards(tmp_path / "sky", dict(llama.state_dict()), config)
    torch.testing.assert_close(our_logits(tmp_path / "sky"), their_logits(llama), rtol=0, atol=1e-4)


def _normalised_gate(lam: float) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    def forward(gate: Any, hidden_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z_TE = F.linear(hidden_TD.reshape(-1, gate.weight.shape[1]), gate.weight).float()
        z_TE = z_TE / (z_TE.std(dim=1, keepdim=True) / lam)
        weight_TK, chosen_TK = z_TE.softmax(1).topk(2, dim=1)
        return z_TE, weight_TK / weight_TK.sum(1, keepdim=True), chosen_TK

    return forward


@pytest.mark.parametrize("gating", ["moe_feature_no_mul_topk", "moe_use_skywork_gating", "moe_use_mixtral_gating"])
def test_skywork_moe_divides_its_gate_by_the_standard_deviation(
    tmp_path: Path, tiny: Tiny, our_logits: Any, their_logits: Any, gating: str
) -> None:
    mixtral = tiny(
        "Mixtral", num_key_value_heads=4, num_local_experts=6, rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    )  # fmt: skip
    mixtral.save_pretrained(tmp_path / "mixtral")
    source = open_checkpoint(tmp_path / "mixtral")
    config = _config(
        num_experts=[6], moe_expert_interval=1, moe_use_logits_norm=True, moe_gate_norm_std=1.5,
        moe_2layer_gate=False, max_position_embeddings=8192, **{gating: True},
    )  # fmt: skip
    write_bin_shards(tmp_path / "sky", {name: source.tensor(name) for name in source.names}, config)
    plain = their_logits(mixtral)
    for layer in mixtral.model.layers:
        layer.mlp.gate.forward = types.MethodType(_normalised_gate(1.5), layer.mlp.gate)
    expected = their_logits(mixtral)
    assert (expected - plain).abs().max() > 0.1
    torch.testing.assert_close(our_logits(tmp_path / "sky"), expected, rtol=0, atol=1e-4)
