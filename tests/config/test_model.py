"""Parameter counts against the model itself, and which mappings are a configuration."""

from typing import Any

import pytest
import torch

from moeforge.config.hf import model_config_from_hf, model_config_to_hf
from moeforge.config.model import ModelConfig, MoEConfig
from moeforge.errors import UserError
from moeforge.layout import unit_names
from moeforge.model import Transformer

SIZES: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "num_layers": 6, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8,
    "ffn_size": 64,
}  # fmt: skip
MOE = MoEConfig(num_experts=5, top_k=2, expert_size=24, gate_norm=1.0, gate_norm_learned=True, router_bias=True)
CONFIGS: dict[str, dict[str, Any]] = {
    "dense": {},
    "tied, biases, q/k norms": {"tie_embeddings": True, "qkv_bias": True, "output_bias": True, "qk_norm": "full"},
    "norms of heads": {"qk_norm": "head", "head_dim": 16},
    "all layers sparse": {"moe": MOE},
    "every third layer sparse": {
        "moe": MoEConfig(num_experts=4, top_k=1, expert_size=16, renormalize=False, layer_frequency=3)
    },
}


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
def test_units_are_counted_as_the_model_has_them(changes: dict[str, Any]) -> None:
    config = ModelConfig(**{**SIZES, **changes})
    with torch.device("meta"):
        sizes = {name: weight.numel() for name, weight in Transformer(config).state_dict().items()}
    assert config.parameters() == sum(sizes.values())
    unused = 1 - config.moe.top_k / config.moe.num_experts if config.moe else 0
    for unit in unit_names(config):
        own = {name: size for name, size in sizes.items() if name.startswith(f"{unit}.")}
        experts = sum(size for name, size in own.items() if ".experts." in name)
        assert config.unit_parameters(unit) == sum(own.values())
        assert config.unit_parameters(unit, active=True) == sum(own.values()) - round(unused * experts)


@pytest.mark.parametrize(
    ("section", "key", "value", "allowed"),
    [
        ("rope", "kind", "yarnn", "one of default, linear, dynamic, llama3, yarn"),
        ("rope", "kind", None, "one of default"),
        ("rope", "factor", "2", "a number"),
        (None, "qk_norm", "foo", "one of none, head, full"),
        (None, "qk_norm", ["head"], "one of none, head, full"),
        (None, "num_layers", None, "a whole number"),
        (None, "eos_token_ids", ["</s>"], "a list of whole numbers"),
        ("moe", "gate_norm", "on", "a number"),
        ("moe", "renormalize", 1, "true or false"),
    ],
)
def test_values_of_another_kind_are_refused(section: str | None, key: str, value: Any, allowed: str) -> None:
    hf = model_config_to_hf(ModelConfig(**SIZES, moe=MOE))
    assert model_config_from_hf(hf).moe == MOE
    (hf["moeforge"][section] if section else hf["moeforge"])[key] = value
    with pytest.raises(UserError) as caught:
        model_config_from_hf(hf)
    name = f"{section}.{key}" if section else key
    assert str(caught.value).startswith(f"config.json: moeforge: {name} = {value!r}: must be {allowed}")


def test_optional_values_may_be_absent() -> None:
    config = ModelConfig(**SIZES)
    assert (
        ModelConfig.from_dict({**config.to_dict(), "sliding_window": None, "moe": None, "bos_token_id": None}) == config
    )


@pytest.mark.parametrize("name", SIZES)
def test_sizes_are_at_least_one(name: str) -> None:
    with pytest.raises(UserError, match=f"{name} = 0: must be at least 1"):
        ModelConfig(**{**SIZES, name: 0})
