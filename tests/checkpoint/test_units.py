"""What a pass holds at a time; its results are compared in tests/evaluate/test_streamed.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from moeforge.checkpoint import load_model, open_checkpoint
from moeforge.checkpoint.units import empty_model, loaded_units
from moeforge.errors import UserError


def loaded(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if not parameter.is_meta}


def test_one_unit_is_loaded_at_a_time(saved: Path) -> None:
    source = open_checkpoint(saved)
    model, whole = empty_model(source), load_model(source, torch.float64)
    assert not loaded(model)
    names = []
    for name, unit in loaded_units(model, source, torch.float64, torch.device("cpu")):
        names.append(name)
        assert loaded(model) == {key for key in loaded(whole) if key.startswith(f"{name}.")}
        for key, weight in unit.named_parameters():
            assert torch.equal(weight, whole.get_parameter(f"{name}.{key}")) and not weight.requires_grad
    assert tuple(names) == model.names


def test_a_tied_embedding_stays_for_the_head(tmp_path: Path, tiny: object) -> None:
    tiny("Llama", tie_word_embeddings=True).save_pretrained(tmp_path / "tied")  # type: ignore[operator]
    model = empty_model(open_checkpoint(tmp_path / "tied"))
    for _ in loaded_units(model, open_checkpoint(tmp_path / "tied"), torch.float32, torch.device("cpu")):
        assert "embed.weight" in loaded(model)


def test_weights_that_are_not_finite(tmp_path: Path, tiny: object) -> None:
    broken = tiny("Llama")  # type: ignore[operator]
    with torch.no_grad():
        broken.model.layers[1].mlp.up_proj.weight[0, 0] = torch.inf
    broken.save_pretrained(tmp_path / "broken")
    source = open_checkpoint(tmp_path / "broken")
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj\.weight.*infinite"):
        list(loaded_units(empty_model(source), source, torch.float32, torch.device("cpu")))
