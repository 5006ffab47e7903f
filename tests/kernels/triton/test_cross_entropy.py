from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moeforge.kernels import linear_cross_entropy
from moeforge.kernels.cross_entropy import _softmax_minus_target
from moeforge.kernels.triton import cross_entropy
from moeforge.kernels.triton.rows import tile

from .compiling import ARCHITECTURES, cross_compile
from .conftest import DTYPES

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def problem(rows: int, columns: int, dtype: torch.dtype, device: str, apart: int = 0) -> tuple[Tensor, Tensor]:
    """Logits whose rows are `apart` columns apart, NaN between them, and targets of which a third is -100."""
    torch.manual_seed(0)
    logits = torch.full((rows, columns + apart), torch.nan)
    logits[:, :columns] = 4 * torch.randn(rows, columns)
    targets = torch.randint(columns, (rows,)).masked_fill(torch.rand(rows) < 0.3, -100)
    return logits.to(dtype).to(device)[:, :columns], targets.to(device)


def exact(logits: Tensor, targets: Tensor, ignore: int = -100) -> tuple[Tensor, Tensor]:
    wide = logits.double().requires_grad_()
    losses = F.cross_entropy(wide, targets, ignore_index=ignore, reduction="none")
    return losses.detach(), torch.autograd.grad(losses.sum(), wide)[0]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("apart", [0, 5, 48])
@pytest.mark.parametrize("rows, columns", [(5, 11), (1, 1), (3, 64), (40, 127), (3, 4096), (4, 4097), (3, 9001)])
def test_losses_and_gradients(rows: int, columns: int, apart: int, dtype: torch.dtype, device: str) -> None:
    logits, targets = problem(rows, columns, dtype, device, apart)
    losses, gradients = exact(logits, targets)
    given = logits.clone()
    only = cross_entropy.softmax_minus_target(logits, targets, -100, keep=False)
    assert torch.equal(logits, given)
    found = cross_entropy.softmax_minus_target(logits, targets, -100, keep=True)
    assert torch.equal(only, found) and found.dtype == torch.float32
    torch.testing.assert_close(found.double(), losses, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits.double(), gradients, rtol=TOLERANCE[dtype], atol=1e-6)
    ignored = targets == -100
    assert not found[ignored].any() and not logits[ignored].any()
    if apart:  # what lies between the rows is nobody's
        assert logits.as_strided((rows - 1, apart), (columns + apart, 1), columns).isnan().all()


def test_another_ignored_target_and_negative_ones(device: str) -> None:
    """As on CPUs, what is negative and not ignored counts as 0."""
    logits, _ = problem(4, 9, torch.float32, device)
    losses, gradients = exact(logits, torch.tensor([3, 0, 8, 3], device=device), ignore=3)
    found = cross_entropy.softmax_minus_target(logits, torch.tensor([3, -1, 8, 3], device=device), 3, keep=True)
    torch.testing.assert_close(found.double(), losses, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logits.double(), gradients, rtol=1e-5, atol=1e-6)


def test_strided_targets(device: str) -> None:
    logits, _ = problem(4, 9, torch.float32, device)
    targets = torch.arange(8, device=device)[::2]
    losses, _ = exact(logits, targets)
    found = cross_entropy.softmax_minus_target(logits, targets, -100, keep=False)
    torch.testing.assert_close(found.double(), losses, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("columns", [7, 8200])
def test_what_is_not_finite_goes_where_it_goes_on_cpus(columns: int, device: str) -> None:
    """The same code in float64 is torch's."""
    logits, _ = problem(9, columns, torch.float32, device)
    logits[0, 3] = torch.nan
    logits[1, columns - 1] = torch.nan  # of a row without a target
    logits[2, 5] = torch.inf
    logits[3, : columns - 2] = -torch.inf  # whole blocks
    logits[4, columns - 3 :] = -torch.inf
    logits[5] = -torch.inf
    logits[6] = torch.nan
    targets = torch.tensor([2, -100, 1, columns - 1, 0, 0, 0, 4, -100], device=device)
    for i in range(len(logits)):
        row, target = logits[i : i + 1], targets[i : i + 1]
        gradient = row.double()
        loss = _softmax_minus_target(gradient, target, -100, keep=True)
        found = cross_entropy.softmax_minus_target(row, target, -100, keep=True).sum()
        torch.testing.assert_close(found.double(), loss, rtol=1e-5, atol=1e-5, equal_nan=True)
        torch.testing.assert_close(row.double(), gradient, rtol=1e-5, atol=1e-6, equal_nan=True)
        assert bool(loss.isnan()) == (i in (0, 1, 2, 5, 6))


def test_a_target_beyond_the_columns_is_not_read(device: str) -> None:
    logits, _ = problem(2, 9, torch.float32, device, apart=7)
    found = cross_entropy.softmax_minus_target(logits, torch.tensor([9, 1], device=device), -100, keep=False)
    assert found.isnan().tolist() == [True, False]


def test_large_logits_do_not_overflow(device: str) -> None:
    logits = torch.tensor([[1e4, 0.0], [-1e4, -1e4]], device=device)
    found = cross_entropy.softmax_minus_target(logits, torch.tensor([1, 0], device=device), -100, keep=True)
    torch.testing.assert_close(found.cpu(), torch.tensor([1e4, 0.6931472]))
    torch.testing.assert_close(logits.cpu(), torch.tensor([[1.0, -1.0], [-0.5, 0.5]]))


def test_nothing(device: str) -> None:
    logits, targets = problem(0, 9, torch.float32, device)
    assert cross_entropy.softmax_minus_target(logits, targets, -100, keep=True).shape == (0,)


def test_a_row_has_the_same_bits_in_any_company(device: str) -> None:
    logits, targets = problem(60, 300, torch.float32, device)
    losses = cross_entropy.softmax_minus_target(logits.clone(), targets, -100, keep=True)
    for begin, end in ((0, 1), (17, 18), (3, 50)):
        part = cross_entropy.softmax_minus_target(logits[begin:end], targets[begin:end], -100, keep=False)
        assert torch.equal(part, losses[begin:end])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_head(dtype: torch.dtype, device: str) -> None:
    torch.manual_seed(0)
    x, weight = (torch.randn(rows, 16).to(dtype).to(device).requires_grad_() for rows in (50, 101))
    targets = torch.randint(101, (50,)).masked_fill(torch.rand(50) < 0.3, -100).to(device)
    ours = linear_cross_entropy(x, weight, targets)
    wide = [y.detach().double().requires_grad_() for y in (x, weight)]
    theirs = F.cross_entropy(wide[0] @ wide[1].t(), targets, reduction="sum")
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), theirs, rtol=TOLERANCE[dtype], atol=0)
    found, expected = torch.autograd.grad(ours, (x, weight)), torch.autograd.grad(theirs, wide)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == dtype and (a.double() - b).norm() / b.norm() < 2 * TOLERANCE[dtype]
    with torch.no_grad():
        assert torch.equal(linear_cross_entropy(x, weight, targets), ours)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("columns", [100, 65519])
@pytest.mark.parametrize("keep", [False, True])
def test_compiles(architecture: int, columns: int, keep: bool) -> None:
    size = tile(columns, 1, cross_entropy._COLUMNS)
    types = {"logits_ptr": "*bf16", "targets_ptr": "*i64", "loss_ptr": "*fp32"}
    types |= {"columns": "i32", "stride": "i32", "ignore": "i32"}
    constants = {"KEEP": keep, "COLUMNS": size.columns}
    cross_compile(cross_entropy._forward, architecture, types, constants, size.warps)
    cross_compile(cross_entropy._forward, architecture, types, constants, size.warps, aligned=False)
