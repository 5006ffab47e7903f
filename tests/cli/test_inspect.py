"""inspect lists every unit, alike ones in one row."""

from __future__ import annotations

import io

from rich.console import Console

from moeforge.cli.inspect import _human, describe
from moeforge.config.model import ModelConfig, MoEConfig

DENSE = ModelConfig(vocab_size=96, hidden_size=32, num_layers=6, num_heads=4, num_kv_heads=2, head_dim=8, ffn_size=64)


def test_units_sum_to_the_model() -> None:
    config = ModelConfig(**{**DENSE.to_dict(), "rope": DENSE.rope, "moe": MoEConfig(4, 2, 16, layer_frequency=3)})
    result = describe(config)
    assert result["params_total"] == sum(unit["params"] for unit in result["units"])
    assert result["params_active"] == sum(unit["params_active"] for unit in result["units"]) < result["params_total"]
    assert [unit["unit"] for unit in result["units"]][:3] == ["embed", "layers.0.attention", "layers.0.ffn"]
    assert [unit["unit"] for unit in result["units"] if unit["kind"] == "experts"] == ["layers.2.ffn", "layers.5.ffn"]


def test_equal_units_share_a_row() -> None:
    config = ModelConfig(**{**DENSE.to_dict(), "rope": DENSE.rope, "moe": MoEConfig(4, 2, 16, layer_frequency=3)})
    console = Console(file=io.StringIO(), width=110)
    console.print(_human(config, describe(config)))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "layers.0-5.attention" in text
    assert "layers.2-5.ffn (2 of them)" in text
    assert "layers.0-4.ffn (4 of them)" in text
