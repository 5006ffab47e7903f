"""Refusals come before any weight is read and name the key."""

from __future__ import annotations

from typing import Any

import pytest

from moeforge.config.model import ModelConfig, MoEConfig
from moeforge.errors import UserError
from moeforge.upcycle.config import UpcycleConfig

DENSE = ModelConfig(vocab_size=32, hidden_size=16, num_layers=4, num_heads=2, num_kv_heads=1, head_dim=8, ffn_size=50)


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"method": "copie"}, "method = 'copie'.*virtual-group"),
        ({"router_std": 0.0}, "router_std = 0.0"),
        ({"noise_std": float("nan")}, "noise_std = nan"),
        ({"drop_ratio": 1.5}, "drop_ratio = 1.5"),
        ({"seed": -1}, "seed = -1"),
        ({"num_experts": 1, "top_k": 1}, "num_experts = 1"),
        ({"granularity": 2}, "granularity = 2: only --method virtual-group"),
        ({"method": "virtual-group", "granularity": 3}, "must divide num_experts"),
        ({"method": "virtual-group", "granularity": 4}, r"must divide top_k \(2\)"),
        ({"method": "virtual-group", "granularity": 0}, "granularity = 0"),
    ],
)
def test_refused_arguments(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        UpcycleConfig(**arguments)


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"top_k": 9}, "top_k = 9"),
        ({"top_k": 1}, "top_k = 1 with moe.renormalize"),
        ({"num_experts": 2, "gate_norm": 1.0}, "at least 3 experts"),
        ({"layer_frequency": 5}, "layer_frequency = 5"),
        ({"method": "virtual-group", "top_k": 4}, r"granularity = 4: must divide the dense FFN width \(50\)"),
    ],
)
def test_refused_for_this_model(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        UpcycleConfig(**arguments).model_config(DENSE)


def test_refuses_a_mixture() -> None:
    mixture = ModelConfig.from_dict({**DENSE.to_dict(), "moe": vars(MoEConfig(8, 2, 50))})
    with pytest.raises(UserError, match="already a mixture of 8 experts"):
        UpcycleConfig().model_config(mixture)


def test_gate_norm_is_on_where_it_is_defined() -> None:
    def gate_norm(**arguments: Any) -> float | None:
        moe = UpcycleConfig(**arguments).model_config(DENSE).moe
        assert moe is not None
        return moe.gate_norm

    assert gate_norm() == 1.0
    assert gate_norm(gate_norm=None) is None
    assert gate_norm(num_experts=2) is None
    assert gate_norm(top_k=1, renormalize=False) is None
    assert gate_norm(gate_norm=2.0) == 2.0


def test_granularity_defaults_to_one_copy_a_token() -> None:
    config = UpcycleConfig(num_experts=8, top_k=2, method="virtual-group")
    moe = config.model_config(DENSE).moe
    assert (config.shards, config.copies, config.output_scale) == (2, 4, 2.0)
    assert moe is not None and moe.expert_size == 25
