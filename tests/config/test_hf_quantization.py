from __future__ import annotations

from typing import Any

import pytest

from moeforge.config.hf import model_config_from_hf, model_config_to_hf
from moeforge.config.hf_quantization import quantization_from_hf, quantization_to_hf
from moeforge.config.quantization import QuantizationConfig, matrices
from moeforge.errors import UserError

from .test_quantization import ALL, MODEL

BLOCKS = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
RELEASED = {"quant_method": "fp8", "activation_scheme": "dynamic"}  # Skywork-MoE-Base-FP8's, whole
EIGHT = {"num_bits": 8, "type": "float"}


def compressed(weights: Any, inputs: Any, **more: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {
        "quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"group_0": group}, **more
    }  # fmt: skip


@pytest.mark.parametrize("activations", ["none", "dynamic", "static"])
@pytest.mark.parametrize("scales", ["tensor", "channel", "block128"])
@pytest.mark.parametrize("kept", [(), (ALL[0], ALL[6])])
def test_there_and_back(scales: Any, activations: Any, kept: tuple[str, ...]) -> None:
    if (scales, activations) == ("block128", "static"):
        return
    wanted = QuantizationConfig(scales, activations, kept)
    modules = matrices(MODEL)
    unquantized = ["lm_head", "model.layers.1.block_sparse_moe.gate", *(m for k in kept for m in modules[k])]
    written = quantization_to_hf(wanted, unquantized)
    assert quantization_from_hf(written, MODEL, ()) == wanted
    suffix = ".weight_scale_inv" if scales == "block128" else ".weight_scale"
    names = [module + suffix for matrix in modules if matrix not in kept for module in modules[matrix]]
    assert quantization_from_hf(written, MODEL, names) == wanted


def test_a_whole_configuration_of_our_own_form() -> None:
    data = model_config_to_hf(MODEL)
    assert "quantization_config" not in data and model_config_from_hf(data).quantization is None
    data["quantization_config"] = BLOCKS
    assert model_config_from_hf(data).quantization == QuantizationConfig("block128", "dynamic")


@pytest.mark.parametrize(
    ("data", "names", "expected"),
    [
        (BLOCKS, (), ("block128", "dynamic")),
        (RELEASED, (), ("tensor", "dynamic")),
        (RELEASED | {"activation_scheme": "static"}, (), ("tensor", "static")),
        # Without a size the name of the scales decides.
        (RELEASED, ["weight_scale_inv"], ("block128", "dynamic")),
        (RELEASED | {"weight_block_size": None}, ["weight_scale_inv"], ("tensor", "dynamic")),
        (compressed(EIGHT | {"strategy": "tensor"}, None), (), ("tensor", "none")),
        (compressed(EIGHT | {"strategy": "channel"}, EIGHT | {"dynamic": True}), (), ("channel", "dynamic")),
        (compressed(EIGHT | {"strategy": "block", "block_structure": [128, 128]}, None), (), ("block128", "none")),
        (compressed(EIGHT | {"strategy": "tensor"}, EIGHT | {"dynamic": False}), (), ("tensor", "static")),
    ],
)
def test_what_others_write(data: dict[str, Any], names: Any, expected: tuple[Any, Any]) -> None:
    every = [f"{module}.{name}" for name in names for modules in matrices(MODEL).values() for module in modules]
    assert quantization_from_hf(data, MODEL, every) == QuantizationConfig(*expected)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"quant_method": "gptq"}, 'quant_method = "gptq" is not supported here; only fp8'),
        ({}, 'quant_method = "unknown"'),
        ("fp8", "must be a mapping"),
        (BLOCKS | {"weight_block_size": [64, 64]}, r"weight_block_size = \[64, 64\]: must be \[128, 128\] or null"),
        (BLOCKS | {"activation_scheme": "odd"}, 'activation_scheme = "odd": must be dynamic, static'),
        (BLOCKS | {"activation_scheme": "static"}, "block128"),
        (BLOCKS | {"fmt": "e5m2"}, 'fmt = "e5m2": must be e4m3'),
        (BLOCKS | {"weight_only": "yes"}, 'weight_only = "yes": must be true, false'),
        (BLOCKS | {"modules_to_not_convert": 3}, "must be a list of names"),
        (BLOCKS | {"modules_to_not_convert": "lm_head"}, "'lm_head': must be a list of names"),
        (compressed(EIGHT | {"strategy": "group"}, None), "strategy tensor, channel, or block"),
        (compressed(EIGHT | {"strategy": "block", "block_structure": [64, 64]}, None), "strategy tensor"),
        (compressed({"num_bits": 4, "type": "int", "strategy": "channel"}, None), "8-bit floats"),
        (compressed(EIGHT | {"strategy": "tensor"}, {"num_bits": 8, "type": "int"}), "input_activations"),
        (compressed(EIGHT | {"strategy": "tensor"}, None, format="pack-quantized"), 'format = "pack-quantized"'),
        (compressed(EIGHT | {"strategy": "tensor"}, None, kv_cache_scheme={"a": 1}), "kv_cache_scheme"),
        (compressed(EIGHT | {"strategy": "tensor"}, None, transform_config={"a": 1}), "transform_config"),
        (compressed(EIGHT | {"strategy": ["tensor"]}, None), "strategy tensor, channel, or block"),
        (compressed(EIGHT | {"strategy": "tensor", "symmetric": False}, None), "weights = .*symmetric"),
        (compressed(EIGHT | {"strategy": "tensor"}, EIGHT | {"symmetric": False}), "input_activations = .*symmetric"),
        (compressed(EIGHT | {"strategy": "tensor"}, EIGHT | {"dynamic": "local"}), "dynamic true or false"),
        (
            {
                **(data := compressed(EIGHT | {"strategy": "tensor"}, None)),
                "config_groups": {"a": data["config_groups"]["group_0"] | {"output_activations": EIGHT}},
            },
            "output_activations = .*: must be null",
        ),
        ({"quant_method": "compressed-tensors", "format": "float-quantized"}, "config_groups = None"),
    ],
)
def test_what_is_refused(data: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        quantization_from_hf(data, MODEL, ())
    assert "\n" not in str(error.value)
