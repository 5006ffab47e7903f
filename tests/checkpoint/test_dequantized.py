"""FP8 files that others wrote: read, dequantised, and refused where they are not what their configuration says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moeforge.checkpoint import dequantized, load_model, open_checkpoint
from moeforge.errors import UserError

Edit = Callable[[dict[str, Tensor]], Any]
WEIGHT = "model.layers.1.block_sparse_moe.experts.2.w3"


@pytest.fixture
def released(tmp_path: Path, tiny: Callable[..., Any]) -> Callable[..., Path]:
    """A Mixtral laid out as the released Skywork-MoE-Base-FP8: a 0-d weight_scale a tensor; `edit` changes tensors."""

    def write(edit: Edit = lambda tensors: None, **config: Any) -> Path:
        path = tmp_path / "released"
        tiny("Mixtral", num_local_experts=4).bfloat16().save_pretrained(path)
        tensors = load_file(path / "model.safetensors")
        for name, weight in list(tensors.items()):
            if "_proj" in name or ".experts." in name:
                scale = weight.float().abs().max() / 448
                tensors[name] = (weight.float() / scale).to(torch.float8_e4m3fn)
                tensors[name.replace(".weight", ".weight_scale")] = scale
        edit(tensors)
        save_file(tensors, path / "model.safetensors", {"format": "pt"})
        data = json.loads((path / "config.json").read_text())
        data["quantization_config"] = {"activation_scheme": "dynamic", "quant_method": "fp8", **config}
        (path / "config.json").write_text(json.dumps(data))
        return path

    return write


def test_the_released_layout(released: Callable[..., Path], our_logits: Callable[..., Tensor]) -> None:
    source = open_checkpoint(released(weight_only=True))
    plain = dequantized(source)
    assert plain.config.quantization is None and dequantized(plain) is plain
    name = f"{WEIGHT}.weight"
    by_hand = source.tensor(name).float() * source.tensor(f"{WEIGHT}.weight_scale")
    assert torch.equal(plain.tensor(name), by_hand.bfloat16()) and plain.dtype(name) == torch.bfloat16
    assert torch.equal(plain.tensor("model.norm.weight"), source.tensor("model.norm.weight"))
    torch.testing.assert_close(
        our_logits(load_model(source, torch.float32)), our_logits(load_model(plain, torch.float32)), rtol=0, atol=0.3
    )


def _ones(suffix: str, *shape: int, value: float = 1.0) -> Edit:
    def edit(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.endswith(".weight_scale")]:
            tensors[name.replace(".weight_scale", suffix)] = torch.full(shape, value)

    return edit


def test_scales_of_inputs_by_both_names_or_unused(released: Callable[..., Path]) -> None:
    for suffix, shape in ((".act_scale", ()), (".input_scale", (1,))):

        def edit(tensors: dict[str, Tensor], suffix: str = suffix, shape: tuple[int, ...] = shape) -> None:
            _ones(suffix, *shape, value=0.5)(tensors)
            tensors[f"{WEIGHT}{suffix}"] = torch.full(shape, 2.0)

        model = load_model(released(edit, activation_scheme="static"))
        assert model.get_parameter("layers.1.ffn.experts.w13_input_scale").item() == 2  # the largest of a layer
        assert model.get_parameter("layers.1.ffn.experts.w2_input_scale").item() == 0.5
        assert model.get_parameter("layers.0.attention.o.input_scale").shape == ()
        unused = open_checkpoint(released(edit))
        assert not any("input_scale" in name for name in unused.names)


def _pop(name: str) -> Edit:
    return lambda tensors: tensors.pop(name)


def _set(name: str, value: Callable[[Tensor], Tensor]) -> Edit:
    return lambda tensors: tensors.update({name: value(tensors[name])})


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_pop(f"{WEIGHT}.weight_scale"), "one matrix, of which all or nothing must be FP8"),
        (
            _pop("model.layers.0.self_attn.o_proj.weight_scale"),
            "o_proj.weight is torch.float8_e4m3fn; its dtype must be another",
        ),
        (
            _set("model.layers.0.self_attn.o_proj.weight", lambda w: w.bfloat16()),
            "must be float8_e4m3fn, as it has a scale",
        ),
        (
            _set("model.layers.0.self_attn.o_proj.weight_scale", lambda s: torch.ones(3)),
            r"o_proj.weight_scale has shape \(3,\)",
        ),
    ],
)
def test_files_that_are_not_what_they_say(edit: Edit, message: str, released: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match=message):
        open_checkpoint(released(edit))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model.layers.0.self_attn.o_proj.weight", lambda w: torch.full(w.shape, torch.nan).to(w.dtype)),
        ("model.layers.0.self_attn.o_proj.weight_scale", lambda s: torch.tensor(torch.inf)),
    ],
)
def test_values_that_are_not_finite(name: str, value: Any, released: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match=f"{name}.*only finite"):
        load_model(released(_set(name, value)))
