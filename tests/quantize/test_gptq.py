from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moeforge.config.quantization import Scales
from moeforge.kernels.fp8 import to_e4m3
from moeforge.quantize.gptq import Feedbacks, feedback, gptq
from moeforge.quantize.weight import quantize_weight


def correlated(rows: int, columns: int) -> Tensor:
    """Inputs of a few large directions and some of no size, as activations are."""
    torch.manual_seed(1)
    return torch.randn(rows, columns) * torch.logspace(0, -2, columns) @ torch.randn(columns, columns)


def output_error(values: Tensor, scales: Tensor, weight: Tensor, inputs: Tensor) -> float:
    """Of what is computed with the weight: tr(E H E^T) to the half."""
    return float((inputs.double() @ (values.double() * scales - weight).T).norm())


def spread(stored: Tensor, weight: Tensor, scales: Scales) -> Tensor:
    if scales != "block128":
        return stored.expand_as(weight)
    return stored.repeat_interleave(128, 0).repeat_interleave(128, 1)[: weight.shape[0], : weight.shape[1]]


@pytest.mark.parametrize("scales", ["tensor", "channel", "block128"])
@pytest.mark.parametrize("shape", [(200, 300), (7, 5), (130, 129)])
def test_outputs_are_nearer_than_with_the_nearest_values(scales: Scales, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    weight, inputs = torch.randn(shape), correlated(500, shape[1])
    nearest, stored = quantize_weight(weight, scales)
    found, same = quantize_weight(weight, scales, feedback(inputs))
    assert torch.equal(stored, same) and found.dtype == nearest.dtype and found.is_contiguous()
    every = spread(stored, weight, scales)
    limit = 0.7 if shape[1] > 100 else 0.9
    assert output_error(found, every, weight, inputs) < limit * output_error(nearest, every, weight, inputs)
    assert torch.equal(
        found.float(), quantize_weight(weight, scales, feedback(inputs * 2.0**80))[0].float()
    )  # no overflow


def test_every_column_is_the_best_for_those_before_it() -> None:
    """In float64, by Schur complements: given the errors of the columns before it, and what later columns can make up
    for, a column's value is the nearest to the best one."""
    torch.manual_seed(0)
    weight, inputs = torch.randn(6, 9), correlated(40, 9)
    found = gptq(weight, torch.ones_like(weight), feedback(inputs)).double()
    hessian = (inputs.T @ inputs).double()
    hessian += 9 / 40 * hessian.diagonal().mean() * torch.eye(9)
    order = hessian.diagonal().argsort(descending=True)
    for place, k in enumerate(order):
        before, after = order[:place], order[place + 1 :]
        inverse = torch.linalg.inv(hessian[after][:, after])
        schur = hessian - hessian[:, after] @ inverse @ hessian[after]
        error = found - weight
        best = weight[:, k] - error[:, before] @ schur[before, k] / schur[k, k]
        assert torch.equal(found[:, k], to_e4m3(best.float()).double())


def test_what_e4m3_holds_stays() -> None:
    torch.manual_seed(0)
    weight = to_e4m3(torch.randn(20, 200) * 10).float()
    for scale in (1.0, 0.25):
        found = gptq(weight * scale, torch.full_like(weight, scale), feedback(correlated(300, 200)))
        assert torch.equal(found.float(), weight)


def test_columns_without_inputs_are_rounded_to_nearest() -> None:
    torch.manual_seed(0)
    weight, inputs = torch.randn(20, 200), correlated(300, 200)
    inputs[:, 50:150] = 0
    values, stored = quantize_weight(weight, "channel")
    found, _ = quantize_weight(weight, "channel", feedback(inputs))
    assert torch.equal(found[:, 50:150].float(), values[:, 50:150].float())
    assert output_error(found, stored, weight, inputs) < 0.9 * output_error(values, stored, weight, inputs)
    for nothing in (inputs[:0], torch.zeros(10, 200)):
        assert torch.equal(quantize_weight(weight, "channel", feedback(nothing))[0].float(), values.float())


def test_few_inputs_say_little() -> None:
    """One token is no reason to move weights: other inputs are not served worse than about as the nearest values do."""
    torch.manual_seed(0)
    weight, inputs = torch.randn(50, 200), correlated(1001, 200)
    values, stored = quantize_weight(weight, "channel")
    found, _ = quantize_weight(weight, "channel", feedback(inputs[:1]))
    others = inputs[1:]
    assert output_error(found, stored, weight, others) < 1.1 * output_error(values, stored, weight, others)


def test_saturated_columns_are_made_up_for() -> None:
    torch.manual_seed(0)
    weight, inputs = torch.randn(20, 100), correlated(300, 100)
    scales = torch.full_like(weight, 1.5 / 448)  # of the values beyond 1.5 nothing is left but 1.5
    found, clipped = gptq(weight, scales, feedback(inputs)), to_e4m3(weight / scales)
    assert found.float().abs().max() == 448 and (weight.abs() > 1.5).any()
    assert output_error(found, scales, weight, inputs) < 0.7 * output_error(clipped, scales, weight, inputs)


def test_damping_grows_until_the_factor_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    factor, tried = torch.linalg.cholesky_ex, []

    def fails_twice(matrix: Tensor) -> tuple[Tensor, Tensor]:
        tried.append(matrix.diagonal().mean().item())
        lower, failed = factor(matrix)
        return lower, failed + (len(tried) < 3)

    monkeypatch.setattr(torch.linalg, "cholesky_ex", fails_twice)
    torch.manual_seed(0)
    weight, inputs = torch.randn(20, 100), correlated(10_000, 100)
    found, stored = quantize_weight(weight, "channel", feedback(inputs))
    assert tried == pytest.approx([tried[0], tried[0] * 1.1 / 1.01, tried[0] * 2 / 1.01])
    nearest, _ = quantize_weight(weight, "channel")
    assert output_error(found, stored, weight, inputs) < output_error(nearest, stored, weight, inputs)


def test_feedback_is_found_once_for_matrices_of_the_same_inputs() -> None:
    known = Feedbacks()
    gate_and_up, down = correlated(30, 12), correlated(30, 9)
    first = known.of(gate_and_up)
    assert known.of(down).matrix.shape == (9, 9)
    assert known.of(gate_and_up) is first
    again = known.of(gate_and_up.clone())
    assert again is not first and torch.equal(again.matrix, first.matrix)
