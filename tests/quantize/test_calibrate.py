from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moeforge.checkpoint import load_model, open_checkpoint, save_model
from moeforge.config.quantization import QuantizationConfig
from moeforge.data import Batch
from moeforge.errors import RunError
from moeforge.evaluate import sliding_windows
from moeforge.model import DenseAttention, ForwardContext
from moeforge.quantize import calibrate, observe, quantize

from .conftest import MOE, TOKENS, MakeCheckpoint, distance, logits, random_model

CPU = torch.device("cpu")


def batches() -> list[Batch]:
    return list(sliding_windows(TOKENS.tolist() + [1], 8, 8))


@pytest.mark.parametrize("changes", [{"qkv_bias": True, "output_bias": True}, {"moe": MOE}])
def test_the_largest_inputs_of_every_matrix(changes: dict[str, Any], make: MakeCheckpoint) -> None:
    source = make(**changes)
    found = calibrate(source, batches(), torch.float32, CPU)
    model = load_model(source)
    seen: dict[str, float] = {}

    def spy(name: str, linear: Any) -> None:
        def watch(x: Tensor, weight: Any = None, bias: Any = None, original: Any = linear.project) -> Tensor:
            seen[name] = max(seen.get(name, 0.0), x.abs().max().item())
            y: Tensor = original(x)
            return y if linear.bias is None or name.endswith(".o") else y + linear.bias

        linear.project = linear.forward = watch

    for name, unit in model.units():
        for path, module in unit.named_modules():
            if type(module).__name__ == "Linear":
                spy(f"{name}.{path}", module)
            if type(module).__name__ == "Experts":

                def routed(x: Tensor, ends: Tensor, at: str = f"{name}.{path}", experts: Any = module) -> Tensor:
                    parts, begin = [], 0
                    for e, end in enumerate(ends.tolist()):
                        gate, up = F.linear(x[begin:end], experts.w13[e]).chunk(2, -1)
                        h, begin = F.silu(gate) * up, end
                        for key, value in ((".w13", x), (".w2", h)):
                            if value.numel():
                                seen[at + key] = max(seen.get(at + key, 0.0), value.abs().max().item())
                        parts.append(F.linear(h, experts.w2[e]))
                    return torch.cat(parts)

                module.forward = routed
    with torch.no_grad():
        for batch in batches():
            context = ForwardContext(DenseAttention(*batch.tokens.shape))
            model(batch.tokens.flatten(), batch.positions.flatten(), context)
    assert found.keys() == seen.keys()
    for name, value in seen.items():
        assert math.isclose(found[name], value, rel_tol=1e-5), name


def test_every_expert_has_inputs_of_its_own(make: MakeCheckpoint) -> None:
    source = make(moe=MOE, qkv_bias=True)
    units = list(observe(source, batches(), torch.float32, CPU))
    assert [list(unit) for unit in units if unit] == [
        [f"layers.{i}.{matrix}" for matrix in matrices]
        for i in range(2)
        for matrices in (["attention.qkv", "attention.o"], ["ffn.experts.w13", "ffn.experts.w2"])
    ]
    found = {matrix: inputs for unit in units for matrix, inputs in unit.items()}
    assert [tuple(x.shape) for x in found["layers.1.attention.qkv"]] == [(24, 160)]
    assert [tuple(x.shape) for x in found["layers.1.attention.o"]] == [(24, 192)]
    model = load_model(source)
    for layer in range(2):
        w13, w2 = found[f"layers.{layer}.ffn.experts.w13"], found[f"layers.{layer}.ffn.experts.w2"]
        assert len(w13) == len(w2) == 4 and sum(map(len, w13)) == 24 * 2
        for e, (x, h) in enumerate(zip(w13, w2, strict=True)):
            gate, up = F.linear(x, model.state_dict()[f"layers.{layer}.ffn.experts.w13"][e]).chunk(2, -1)
            torch.testing.assert_close(h, F.silu(gate) * up)


@pytest.mark.parametrize("scales", ["tensor", "channel"])
def test_static_scales_serve_what_they_were_made_on(scales: Any, make: MakeCheckpoint) -> None:
    source = make(moe=MOE)
    inputs = calibrate(source, batches(), torch.float32, CPU)
    made = quantize(source, source.path.with_name("fp8"), QuantizationConfig(scales, "static"), inputs)
    found = open_checkpoint(made.path)
    assert found.config.quantization == QuantizationConfig(scales, "static")
    model = load_model(found)
    for name, matrix in (
        ("layers.0.attention.qkv", ""),
        ("layers.1.ffn.experts", "w13_"),
        ("layers.1.ffn.experts", "w2_"),
    ):
        key = f"{name}.{matrix.rstrip('_')}".rstrip(".")
        scale = model.get_parameter(f"{name}.{matrix}input_scale")
        assert scale.item() == pytest.approx(inputs[key] / 448)
    exact = logits(source)
    assert 1e-3 < distance(logits(found), exact) < 0.2
    saturated = quantize(
        source,
        source.path.with_name("low"),
        QuantizationConfig(scales, "static"),
        {k: v / 100 for k, v in inputs.items()},
    )
    assert distance(logits(open_checkpoint(saturated.path)), exact) > 0.3


def test_overflow_is_told_by_name(tmp_path: Any) -> None:
    model = random_model()
    with torch.no_grad():
        model.get_parameter("layers.1.ffn.norm.weight").fill_(1e38)
    source = open_checkpoint(save_model(model, tmp_path / "model"))
    with pytest.raises(RunError, match=r"layers\.1\.ffn\.w"):
        calibrate(source, batches(), torch.float32, CPU)
