"""Fusing and unfusing are each other's inverse, and shapes are counted as the configuration counts them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from moeforge.checkpoint import canonical_shapes, fuse, fused_names, fused_weight, unfuse
from moeforge.config.model import ModelConfig, MoEConfig
from moeforge.model import Transformer

MOE = MoEConfig(
    num_experts=3,
    top_k=2,
    expert_size=5,
    gate_norm=1.0,
    gate_norm_learned=True,
    router_bias=True,
    layer_frequency=2,
)
CONFIGS = {
    "dense": {"qkv_bias": True, "output_bias": True, "qk_norm": "full"},
    "tied, head norms": {"tie_embeddings": True, "qk_norm": "head"},
    "experts": {"moe": MOE},
}


def _config(case: str) -> ModelConfig:
    sizes = {
        "vocab_size": 11, "hidden_size": 12, "num_layers": 2, "num_heads": 6, "num_kv_heads": 2,
        "head_dim": 4, "ffn_size": 7,
    }  # fmt: skip
    return ModelConfig(**sizes, **CONFIGS[case])


def _weights(config: ModelConfig) -> dict[str, Tensor]:
    return {name: torch.randn(shape) for name, shape in canonical_shapes(config).items()}


@pytest.mark.parametrize("case", CONFIGS)
def test_there_and_back(case: str) -> None:
    config = _config(case)
    weights = _weights(config)
    fused = dict(fuse(config, weights.__getitem__))
    back = dict(unfuse(config, fused.__getitem__))
    assert back.keys() == weights.keys()
    for name, weight in weights.items():
        assert torch.equal(back[name], weight), name


@pytest.mark.parametrize("case", CONFIGS)
def test_fused_names_and_shapes_are_the_models(case: str) -> None:
    config = _config(case)
    with torch.device("meta"):
        expected = {name: weight.shape for name, weight in Transformer(config).state_dict().items()}
    fused = {name: weight.shape for name, weight in fuse(config, _weights(config).__getitem__)}
    assert fused == expected


@pytest.mark.parametrize("case", CONFIGS)
def test_sizes_add_up_to_the_parameter_count(case: str) -> None:
    config = _config(case)
    assert sum(math.prod(shape) for shape in canonical_shapes(config).values()) == config.parameters()


def test_a_group_holds_its_query_heads_then_its_key_then_its_value() -> None:
    config = _config("dense")
    weights = _weights(config)
    qkv = dict(fuse(config, weights.__getitem__))["layers.0.attention.qkv.weight"].unflatten(0, (2, 5, 4))
    q, k, v = (weights[f"model.layers.0.self_attn.{part}_proj.weight"].unflatten(0, (-1, 4)) for part in "qkv")
    for group in range(2):
        assert torch.equal(qkv[group, :3], q[3 * group : 3 * group + 3])
        assert torch.equal(qkv[group, 3], k[group])
        assert torch.equal(qkv[group, 4], v[group])


@pytest.mark.parametrize("case", CONFIGS)
def test_one_weight_asks_for_what_it_is_made_of_and_nothing_else(case: str) -> None:
    config, asked = _config(case), list[str]()
    weights = _weights(config)

    def tensor(name: str) -> Tensor:
        asked.append(name)
        return weights[name]

    for name, expected in fuse(config, weights.__getitem__):
        assert torch.equal(fused_weight(config, name, tensor), expected)
    assert sorted(asked) == sorted(weights)
    assert list(fused_names(config)) == [name for name, _ in fuse(config, weights.__getitem__)]


def test_of_stacked_experts_only_those_asked_for_are_read() -> None:
    config = _config("experts")
    weights = _weights(config)
    whole = dict(fuse(config, weights.__getitem__))
    others = [name for name in weights if ".experts.0." in name]
    some = {name: weight for name, weight in weights.items() if name not in others}
    for name in ("layers.1.ffn.experts.w13", "layers.1.ffn.experts.w2"):
        assert torch.equal(fused_weight(config, name, some.__getitem__, (1, 3)), whole[name][1:])
