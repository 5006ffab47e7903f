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
        (
            _set("model.layers.0.self_attn.o_proj.weight_scale", lambda s: torch.tensor(2)),
            "o_proj.weight_scale is torch.int64; scales must be floating point",
        ),
        (
            lambda tensors: tensors.update({f"{WEIGHT}.weight_scale_inv": torch.tensor(1.0)}),
            rf"{WEIGHT}.weight_scale(_inv)? and {WEIGHT}.weight_scale(_inv)? are the same tensor",
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
        *(
            ("model.layers.0.self_attn.o_proj.weight_scale", lambda s, value=value: torch.tensor(value))
            for value in (torch.inf, torch.nan, 0.0, -1.0)
        ),
        (
            "model.layers.0.self_attn.o_proj.weight_scale",
            lambda s: torch.tensor(255, dtype=torch.uint8).view(torch.float8_e8m0fnu),
        ),
    ],
)
def test_values_that_cannot_be_used(name: str, value: Any, released: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match=f"{name}.*only finite"):
        load_model(released(_set(name, value)))


def test_an_input_scale_of_zero(released: Callable[..., Path]) -> None:
    path = released(_ones(".input_scale", value=0.0), activation_scheme="static")
    with pytest.raises(UserError, match="input_scale.*only finite, positive"):
        load_model(path)


def test_scales_that_are_powers_of_two(released: Callable[..., Path]) -> None:
    def edit(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.endswith(".weight_scale")]:
            tensors[name] = torch.tensor(0.25).to(torch.float8_e8m0fnu)

    scales = load_model(released(edit)).get_parameter("layers.1.ffn.experts.w13_scales")
    assert scales.dtype == torch.float32 and (scales == 0.25).all()


@pytest.mark.parametrize("shape", [(3, 2), (6,), (1, 6), (2, 3, 1)])
def test_scales_of_blocks_have_one_shape(shape: tuple[int, ...], tmp_path: Path, tiny: Callable[..., Any]) -> None:
    tiny("Llama", hidden_size=256, intermediate_size=384).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.down_proj"
    tensors |= {
        f"{name}.weight": tensors[f"{name}.weight"].to(torch.float8_e4m3fn),
        f"{name}.weight_scale_inv": torch.ones(2, 3),
    }
    data = json.loads((tmp_path / "config.json").read_text())
    data["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (tmp_path / "config.json").write_text(json.dumps(data))
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    open_checkpoint(tmp_path)
    tensors[f"{name}.weight_scale_inv"] = torch.ones(shape)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"down_proj\.weight_scale has shape .*config\.json asks for \(2, 3\)"):
        open_checkpoint(tmp_path)
