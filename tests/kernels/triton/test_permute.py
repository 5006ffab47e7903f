from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moeforge.kernels import combine, expert_permutation, gate, gather
from moeforge.kernels.triton import permute

from .compiling import ARCHITECTURES, cross_compile

TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}


def choose(tokens: int, experts: int, k: int, skew: float, device: str) -> Tensor:
    """Different experts for each token, the later ones more often."""
    return (torch.rand(tokens, experts) + skew * torch.arange(experts)).argsort(-1, descending=True)[:, :k].to(device)


def check(experts: Tensor, num_experts: int, kept: Tensor | None, alignment: int) -> None:
    """Every kept assignment has its own row, in token order from the start of its expert's group."""
    permutation = expert_permutation(experts, num_experts, kept, alignment)
    source, row_TK, ends = permutation.source_R.tolist(), permutation.row_TK.tolist(), permutation.offsets_E.tolist()
    assert permutation.offsets_E.dtype == torch.int32 and len(ends) == num_experts and ends[-1] == len(source)
    expected_source = [0] * len(source)
    start = 0
    for expert, end in enumerate(ends):
        held = (experts == expert) if kept is None else (experts == expert) & kept
        pairs = held.nonzero().tolist()
        size = -(-len(pairs) // alignment) * alignment
        assert end - start == size or (expert == num_experts - 1 and end - start >= size)
        assert [row_TK[t][k] for t, k in pairs] == list(range(start, start + len(pairs)))
        expected_source[start : start + len(pairs)] = [t for t, _ in pairs]
        start = end
    assert source == expected_source
    if kept is not None and not kept.all():
        assert set(permutation.row_TK[~kept].tolist()) == {len(source) - 1}
        assert int(permutation.row_TK[kept].max() if kept.any() else -1) < len(source) - 1


@pytest.mark.parametrize("share", [None, 0.0, 0.6])
@pytest.mark.parametrize(
    "tokens, experts, k, alignment",
    [(1, 1, 1, 32), (0, 4, 2, 32), (1, 16, 2, 32), (33, 5, 3, 32), (70, 60, 8, 16), (301, 3, 1, 1), (40, 200, 6, 8)],
)
def test_every_kept_assignment_has_its_row(
    tokens: int, experts: int, k: int, alignment: int, share: float | None, device: str
) -> None:
    torch.manual_seed(0)
    kept = None if share is None else (torch.rand(tokens, k) < share).to(device)
    check(choose(tokens, experts, k, 0.0, device), experts, kept, alignment)
    if kept is None:
        check(choose(tokens, experts, k, 30.0, device), experts, None, alignment)  # all to the last ones


def test_many_parts(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(permute, "_ELEMENTS", 64)
    for parts in (3, 1000):  # of several turns each, and one block each
        monkeypatch.setattr(permute, "_PARTS", parts)
        experts = choose(60, 7, 2, 0.2, device)
        check(experts, 7, None, 32)
        check(experts, 7, (torch.rand(60, 2) < 0.5).to(device), 4)
        check(experts.t().contiguous().t().to(torch.int32), 7, None, 1)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("tokens, k, columns", [(20, 2, 33), (5, 8, 8), (2, 3, 1500), (1, 1, 1)])
@pytest.mark.parametrize("share", [None, 0.5])
def test_there_and_back(
    tokens: int, k: int, columns: int, dtype: torch.dtype, share: float | None, device: str
) -> None:
    """Against an indexed sum in float64: output and all gradients."""
    torch.manual_seed(0)
    experts, kept = choose(tokens, 9, k, 0.1, device), None
    weights = torch.rand(tokens, k, device=device)
    if share is not None:
        kept = (torch.rand(tokens, k) < share).to(device)
        weights = weights.where(kept, 0.0)
    permutation = expert_permutation(experts, 9, kept)
    leaves = [torch.randn(tokens, columns, device=device).to(dtype).requires_grad_(), weights.requires_grad_()]
    exact_leaves = [leaf.detach().double().requires_grad_() for leaf in leaves]
    factor = torch.randn(len(permutation.source_R), 1, device=device).to(dtype)
    out = combine(gather(leaves[0], permutation) * factor, leaves[1], permutation)
    exact_rows = exact_leaves[0].unsqueeze(1) * factor.double()[permutation.row_TK]
    exact = (exact_rows * exact_leaves[1].unsqueeze(2)).sum(1)
    assert out.dtype == dtype
    tolerance = TOLERANCE[dtype]
    for grad in (torch.randn(out.shape).to(device), torch.ones((), device=device).expand(out.shape)):
        found = out, *torch.autograd.grad(out, leaves, grad.to(dtype), retain_graph=True)
        expected = exact, *torch.autograd.grad(exact, exact_leaves, grad.to(dtype).double(), retain_graph=True)
        if kept is not None:  # what a dropped assignment would have been worth is not defined
            found, expected = (list(each) for each in (found, expected))
            found[2], expected[2] = found[2].where(kept, 0.0), expected[2].where(kept, 0.0)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(
                a.double(), b, rtol=tolerance, atol=tolerance * (1 + float(b.detach().abs().max()))
            )


def test_sums_are_in_float32_and_rows_may_be_apart(device: str) -> None:
    y = torch.tensor([[1.0, 9.0], [2.0**-12, 9.0], [2.0**-12, 9.0], [-1.0, 9.0]]).half().to(device)[:, :1]
    out = permute.combine(y, torch.ones(1, 4, device=device), torch.arange(4, device=device).view(1, 4))
    assert out.item() == 2.0**-11


def test_no_tokens(device: str) -> None:
    x = torch.zeros(0, 3, device=device, requires_grad=True)
    permutation = expert_permutation(torch.zeros(0, 2, dtype=torch.int64, device=device), 4)
    out = combine(gather(x, permutation) * 2, torch.zeros(0, 2, device=device), permutation)
    out.sum().backward()
    assert out.shape == (0, 3) and x.grad.shape == (0, 3)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dropping", [False, True])
def test_permutation_compiles(dropping: bool, architecture: int) -> None:
    types = {"expert_ptr": "*i64", "count_ptr": "*i32", "source_ptr": "*i64"}
    types |= dict.fromkeys(("assignments", "rows", "each"), "i32")
    constants = {"EXPERTS": 16, "BLOCK": 256}
    (types if dropping else constants)["kept_ptr"] = "*i1" if dropping else None
    cross_compile(permute._count, architecture, types | {"rows_each": "i32"}, constants)
    types |= {"row_ptr": "*i64", "offset_ptr": "*i32", "parts": "i32"}
    cross_compile(permute._place, architecture, types, constants | {"E": 16, "K": 2, "ALIGNMENT": 32})


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_combination_compiles(architecture: int) -> None:
    types = {"y_ptr": "*bf16", "row_ptr": "*i64", "columns": "i32", "stride": "i32"}
    constants = {"K": 2, "COLUMNS": 1024}
    cross_compile(permute._combine, architecture, types | {"out_ptr": "*bf16", "weight_ptr": "*fp32"}, constants)
    cross_compile(permute._combine, architecture, types | {"out_ptr": "*bf16"}, constants | {"weight_ptr": None})
    types |= {"grad_ptr": "*bf16", "weight_ptr": "*fp32", "y_grad_ptr": "*bf16", "weight_grad_ptr": "*fp32"}
    cross_compile(permute._combine_backward, architecture, types | {"grad_stride": "i32"}, constants)


@pytest.mark.cuda
def test_a_captured_step_never_waits_for_the_host() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 256, device="cuda", dtype=torch.bfloat16)
    raw = torch.randn(64, 16, device="cuda")

    def step() -> Tensor:
        chosen = gate(raw, 2, 1.0, True)
        permutation = expert_permutation(chosen.experts, 16)
        return combine(gather(x, permutation), chosen.weights, permutation)

    with torch.no_grad():
        step()  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        raw.normal_()
        x.normal_()
        graph.replay()
        assert torch.equal(captured, step())
