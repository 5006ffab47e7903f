"""inspect counts on the model itself what the configuration predicts."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from moeforge.cli.inspect import _human, describe
from moeforge.config.model import ModelConfig, MoEConfig

DENSE = ModelConfig(vocab_size=96, hidden_size=32, num_layers=6, num_heads=4, num_kv_heads=2, head_dim=8, ffn_size=64)
MOE = MoEConfig(num_experts=5, top_k=2, expert_size=24, gate_norm=1.0, gate_norm_learned=True, router_bias=True)
CONFIGS = {
    "dense": {},
    "tied, biases, q/k norms": {
        "tie_embeddings": True,
        "qkv_bias": True,
        "output_bias": True,
        "qk_norm": "full",
    },
    "all layers sparse": {"moe": MOE},
    "every third layer sparse": {
        "moe": MoEConfig(num_experts=4, top_k=1, expert_size=16, renormalize=False, layer_frequency=3)
    },
}


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
def test_counts_agree_with_the_configuration(changes: dict[str, object]) -> None:
    config = ModelConfig(**{**DENSE.to_dict(), "rope": DENSE.rope, **changes})  # type: ignore[arg-type]
    result = describe(config)
    assert result["params_total"] == config.parameters()
    assert result["params_active"] == config.parameters(active=True)
    assert [unit["unit"] for unit in result["units"]][:3] == ["embed", "layers.0.attention", "layers.0.ffn"]
    assert len(result["units"]) == 2 * config.num_layers + 2
    sparse = [unit["unit"] for unit in result["units"] if unit["kind"] == "experts"]
    assert sparse == [f"layers.{layer}.ffn" for layer in config.moe_layers]


def test_equal_units_share_a_row() -> None:
    config = ModelConfig(**{**DENSE.to_dict(), "rope": DENSE.rope, "moe": MoEConfig(4, 2, 16, layer_frequency=3)})
    console = Console(file=io.StringIO(), width=110)
    console.print(_human(config, describe(config)))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "layers.0-5.attention" in text
    assert "layers.2-5.ffn (2 of them)" in text
    assert "layers.0-4.ffn (4 of them)" in text
