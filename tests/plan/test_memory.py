"""The accounting of bytes, against the parameter counts of whole models."""

from dataclasses import replace

import pytest

from moeforge.config.model import MoEConfig
from moeforge.config.presets import PRESETS, model_preset
from moeforge.errors import UserError
from moeforge.layout import unit_names
from moeforge.plan.memory import bytes_per_parameter, unit_memory


@pytest.mark.parametrize("name", PRESETS)
def test_units_sum_to_the_model(name):
    config = model_preset(name)
    units = unit_memory(config, "bf16")
    assert tuple(unit.unit for unit in units) == unit_names(config)
    assert sum(unit.params for unit in units) == config.parameters()
    assert sum(unit.total_bytes for unit in units) == 18 * config.parameters()


def test_router_extras_and_mixed_layers_are_counted():
    moe = MoEConfig(4, 2, 96, gate_norm=1.0, gate_norm_learned=True, router_bias=True, layer_frequency=3)
    config = replace(model_preset("qwen2.5-0.5b"), moe=moe, output_bias=True, qk_norm="full")
    units = unit_memory(config, "fp32")
    assert sum(unit.params for unit in units) == config.parameters()
    kinds = [unit.kind for unit in units if unit.unit.endswith(".ffn")]
    assert kinds == ["dense ffn", "dense ffn", "experts"] * 8


@pytest.mark.parametrize(
    ("precision", "optimizer", "total"),
    [("bf16", "adamw", 18), ("bf16_pure", "adamw", 8), ("fp32", "adamw", 16), ("fp64", "adamw", 32),
     ("bf16", "sgd", 10), ("bf16_pure", "sgd", 4), ("fp32", "sgd", 8)],
)  # fmt: skip
def test_bytes_a_parameter(precision, optimizer, total):
    each = bytes_per_parameter(precision, optimizer)
    assert each.weights + each.gradients + each.optimizer == total


def test_unknown_names_are_refused():
    with pytest.raises(UserError, match='model.precision = "fp8": must be one of bf16, bf16_pure'):
        bytes_per_parameter("fp8")
    with pytest.raises(UserError, match='optimizer.kind = "lion": must be one of adamw, sgd'):
        bytes_per_parameter("bf16", "lion")
