"""The flat list of units, and the choice of those that are recomputed."""

import pytest

from moeforge.errors import UserError
from moeforge.layout import resolve_recompute, unit_names


def test_units_are_a_flat_list(model):
    assert unit_names(model(layers=2)) == (
        "embed", "layers.0.attention", "layers.0.ffn", "layers.1.attention", "layers.1.ffn", "head",
    )  # fmt: skip


def test_recompute_choices(model):
    config = model(layers=2)
    assert resolve_recompute(config, "none") == ()
    assert resolve_recompute(config, "all") == unit_names(config)[1:-1]
    assert resolve_recompute(config, "attention") == ("layers.0.attention", "layers.1.attention")
    assert resolve_recompute(config, ["layers.1.ffn", "layers.0.ffn"]) == ("layers.0.ffn", "layers.1.ffn")
    with pytest.raises(UserError, match=r'"layer.1.fnn": not a layer unit .*; did you mean layers.1.ffn'):
        resolve_recompute(config, ["layer.1.fnn"])
    with pytest.raises(UserError, match='model.recompute = "some": must be one of none, all, '):
        resolve_recompute(config, "some")
