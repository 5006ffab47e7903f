from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from moeforge.config.model import ModelConfig, MoEConfig
from moeforge.config.quantization import (
    QuantizationConfig,
    kept_by_user,
    kept_in_files,
    kept_in_list,
    matrices,
    spellings,
)
from moeforge.errors import UserError

MODEL = ModelConfig(
    vocab_size=9, hidden_size=8, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=4, ffn_size=8,
    moe=MoEConfig(4, 2, 8, layer_frequency=2),
)  # fmt: skip
ALL = (
    "layers.0.attention.qkv", "layers.0.attention.o", "layers.0.ffn.w13", "layers.0.ffn.w2",
    "layers.1.attention.qkv", "layers.1.attention.o", "layers.1.ffn.experts",
)  # fmt: skip


def test_every_projection_belongs_to_one_matrix() -> None:
    found = matrices(MODEL)
    assert tuple(found) == ALL
    modules = [module for names in found.values() for module in names]
    assert len(modules) == len(set(modules)) == 4 + 3 + 4 + 3 * 4


@pytest.mark.parametrize(
    ("names", "kept"),
    [
        ([], ()),
        (["o_proj"], ("layers.0.attention.o", "layers.1.attention.o")),
        (["k_proj"], ("layers.0.attention.qkv", "layers.1.attention.qkv")),  # q, k and v are one matrix
        (["layers.0"], ALL[:4]),
        (["layers.0.mlp", "experts.3"], (*ALL[2:4], ALL[6])),
        (["mlp.down_proj"], ("layers.0.ffn.w2",)),
        (["layers.1.ffn.experts"], ("layers.1.ffn.experts",)),
        (["w2", "self_attn"], (*ALL[:2], *ALL[3:])),
    ],
)
def test_names_that_a_user_gives(names: list[str], kept: tuple[str, ...]) -> None:
    assert kept_by_user(MODEL, names) == kept


@pytest.mark.parametrize("name", ["proj", "layers.7", "", "o_pro", "lm_head"])
def test_a_name_that_nothing_has(name: str) -> None:
    with pytest.raises(UserError, match=f"--keep {name}: no matrix"):
        kept_by_user(MODEL, ["o_proj", name])


def test_names_that_leave_nothing_to_quantise_are_refused() -> None:
    with pytest.raises(UserError, match="nothing is left"):
        kept_by_user(MODEL, ["layers"])


def test_what_files_have_scales_for() -> None:
    def scaled(*but: str, suffix: str = ".weight_scale", mlp: bool = False) -> list[str]:
        found = matrices(MODEL)
        every = [module for matrix, names in found.items() if matrix not in but for module in names]
        weights = [f"{module}.weight" for names in found.values() for module in names]
        return [spellings(module)[-1 if mlp else 0] + suffix for module in every] + weights

    assert kept_in_files(MODEL, scaled()) == ()
    for but in (ALL[:1], ALL[4:], ALL):
        for suffix in (".weight_scale", ".weight_scale_inv"):
            assert kept_in_files(MODEL, scaled(*but, suffix=suffix, mlp=True)) == but
    names = [name for name in scaled() if "v_proj" not in name]
    with pytest.raises(UserError, match="asks for 1000000000000 layers and 4 experts, but the files hold only 42 t"):
        kept_in_files(dataclasses.replace(MODEL, num_layers=10**12), names)
    with pytest.raises(UserError, match=r"layers\.0\.self_attn\.v_proj is not FP8 but .*q_proj is"):
        kept_in_files(MODEL, names)


def test_what_a_list_says() -> None:
    experts = [f"model.layers.1.mlp.experts.{e}.{part}_proj" for e in range(4) for part in ("gate", "up", "down")]
    assert kept_in_list(MODEL, ["lm_head", *experts]) == ("layers.1.ffn.experts",)
    assert kept_in_list(MODEL, ["re:.*self_attn.*"]) == tuple(name for name in ALL if "attention" in name)
    with pytest.raises(UserError, match="one matrix"):
        kept_in_list(MODEL, experts[:-1])
    with pytest.raises(UserError, match="is no pattern"):
        kept_in_list(MODEL, ["re:("])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (("row",), "scales = 'row': must be one of tensor, channel, block128"),
        (("tensor", "w8"), "activations = 'w8': must be one of none, dynamic, static"),
        (("block128", "static"), "'static' with scales = 'block128'"),
    ],
)
def test_what_is_refused(values: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        QuantizationConfig(*values)


def test_a_model_carries_it_and_a_plan_does_not_ask_for_it() -> None:
    quantized = dataclasses.replace(MODEL, quantization=QuantizationConfig("channel", "static", ALL[:2]))
    assert ModelConfig.from_dict(quantized.to_dict()) == quantized
    assert quantized.fingerprint() == MODEL.fingerprint()
    assert MODEL.fp8(ALL[0]) is quantized.fp8(ALL[0]) is None
    assert quantized.fp8(ALL[2]) == quantized.quantization
    for change, message in (
        ({"kept": [1]}, "a list of names"),
        ({"scales": "row"}, "must be one of tensor"),
        ({"x": 1}, "unknown"),
    ):
        data = quantized.to_dict()
        data["quantization"] |= change
        with pytest.raises(UserError, match=message):
            ModelConfig.from_dict(data)
