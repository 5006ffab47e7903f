"""Vocabulary-parallel cross-entropy against torch's over the whole vocabulary."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from moeforge.parallel import Group, Traffic, Watchdog
from moeforge.parallel.cross_entropy import vocab_parallel_cross_entropy

module = importlib.import_module("moeforge.parallel.cross_entropy")
RunRanks = Callable[..., list[Any]]
VOCABULARY, HIDDEN = 11, 6
# Vocabulary rows of every rank; some have none.
SPLITS = {
    "one rank": (11,),
    "even": (6, 5),
    "only the last": (0, 11),
    "nothing in the middle": (7, 0, 4),
    "nothing twice": (0, 5, 0, 6),
}


def problem(tokens: int, dtype: torch.dtype = torch.float64, ignored: float = 0.3) -> tuple[Tensor, Tensor, Tensor]:
    """x_TD, the whole weight_VD, targets_T; the same on every rank."""
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, HIDDEN, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(VOCABULARY, (tokens,), generator=generator)
    return x, weight, targets.masked_fill(torch.rand(tokens, generator=generator) < ignored, -100)


def world(rank: int, size: int) -> Group:
    return Group("tp", tuple(range(size)), rank, torch.distributed.group.WORLD, Traffic(size), Watchdog())


def rows(split: tuple[int, ...], rank: int) -> tuple[int, int]:
    begin = sum(split[:rank])
    return begin, begin + split[rank]


def own_part(weight: Tensor, split: tuple[int, ...], rank: int) -> tuple[Tensor, int]:
    """This rank's rows as a leaf, and the vocabulary id of the first."""
    begin, end = rows(split, rank)
    return weight.detach()[begin:end].clone().requires_grad_(), begin


def reference(x: Tensor, weight: Tensor, targets: Tensor, scale: float = 1.0, ignore: int = -100) -> list[Tensor]:
    """Loss and the gradients of x and of the whole weight, of loss * scale."""
    loss = F.cross_entropy(x @ weight.t(), targets, ignore_index=ignore, reduction="sum")
    return [loss.detach(), *torch.autograd.grad(loss * scale, (x, weight))]


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
def test_loss_and_gradients_at_every_chunk_boundary(
    split: tuple[int, ...], run_ranks: RunRanks, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes, chunks = (0, 1, 3, 8), (1, 2, 3, 1024)

    def work(rank: int) -> list[list[Tensor]]:
        group, found = world(rank, len(split)), []
        for tokens in sizes:
            for chunk in chunks:
                monkeypatch.setattr(module, "_CHUNK", chunk)
                x, weight, targets = problem(tokens)
                own, begin = own_part(weight, split, rank)
                loss = vocab_parallel_cross_entropy(x, own, targets, begin, group)
                (0.37 * loss).backward()
                found.append([loss.detach(), x.grad, own.grad])
        return found

    results = run_ranks(len(split), work)
    for case, by_rank in enumerate(zip(*results, strict=True)):
        wanted = reference(*problem(sizes[case // len(chunks)]), scale=0.37)
        losses, grads_x, grads_weight = zip(*by_rank, strict=True)
        assert all(torch.equal(loss, losses[0]) for loss in losses)
        together = losses[0], torch.stack(grads_x).sum(0), torch.cat(grads_weight)
        for a, b in zip(together, wanted, strict=True):
            assert a.dtype == torch.float64
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_finite_differences(run_ranks: RunRanks) -> None:
    """Every rank shakes the same x, and its own rows while the others hold still."""
    split = (7, 0, 4)

    def work(rank: int) -> None:
        group = world(rank, len(split))
        x, weight, targets = problem(4)
        own, begin = own_part(weight, split, rank)

        def loss(a: Tensor, w: Tensor) -> Tensor:
            return vocab_parallel_cross_entropy(a, w, targets, begin, group)

        def slope(of: Callable[[float], Tensor]) -> Tensor:
            return (of(1e-6) - of(-1e-6)) / 2e-6

        grad_x, grad_own = torch.autograd.grad(loss(x, own), (x, own))
        grad_x = group.all_reduce(grad_x.clone())
        with torch.no_grad():
            for i in range(x.numel()):
                step = F.one_hot(torch.tensor(i), x.numel()).view_as(x).double()
                found = slope(lambda h, step=step: loss(x + h * step, own))
                torch.testing.assert_close(found, (grad_x * step).sum(), rtol=1e-6, atol=1e-7)
            for i in range(weight.numel()):
                step = F.one_hot(torch.tensor(i), weight.numel()).view_as(weight).double()
                mine = step[slice(*rows(split, rank))]
                found = slope(lambda h, mine=mine: loss(x, own + h * mine))
                wanted = group.all_reduce((grad_own * mine).sum())
                torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7)

    run_ranks(len(split), work)


def test_another_ignored_target_and_logits_that_would_overflow(run_ranks: RunRanks) -> None:
    split = (4, 7)

    def work(rank: int) -> None:
        group = world(rank, 2)
        x, weight, _ = problem(4)
        targets = torch.tensor([3, 0, 3, 9])
        own, begin = own_part(weight, split, rank)
        found = vocab_parallel_cross_entropy(x, own, targets, begin, group, ignore=3)
        grad_x, grad_own = torch.autograd.grad(found, (x, own))
        loss, wanted_x, wanted_weight = reference(x, weight, targets, ignore=3)
        torch.testing.assert_close(found.detach(), loss)
        torch.testing.assert_close(group.all_reduce(grad_x), wanted_x)
        torch.testing.assert_close(grad_own, wanted_weight[slice(*rows(split, rank))])

        large = torch.tensor([[1e4, 0.0]], requires_grad=True)
        unit = torch.eye(2)[rank : rank + 1].clone().requires_grad_()
        loss = vocab_parallel_cross_entropy(large, unit, torch.tensor([1]), rank, group)
        loss.backward()
        assert loss.item() == pytest.approx(1e4)
        torch.testing.assert_close(group.all_reduce(large.grad), torch.tensor([[1.0, -1.0]]))

    run_ranks(2, work)


def test_under_recomputation(run_ranks: RunRanks) -> None:
    split = (7, 0, 4)

    def work(rank: int) -> None:
        group = world(rank, len(split))
        x, weight, targets = problem(5)
        own, begin = own_part(weight, split, rank)
        loss = checkpoint(vocab_parallel_cross_entropy, x, own, targets, begin, group, use_reentrant=False)
        loss.backward()
        _, grad_x, grad_weight = reference(x, weight, targets)
        torch.testing.assert_close(group.all_reduce(x.grad), grad_x, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(own.grad, grad_weight[slice(*rows(split, rank))], rtol=1e-9, atol=1e-12)

    run_ranks(len(split), work)


def test_bf16_has_float32_statistics_and_an_unrounded_scale(run_ranks: RunRanks) -> None:
    split, scale = (0, 60, 40), 1.0 / 1013  # 0.3 % from the nearest bf16 number
    torch.manual_seed(0)
    whole_x, whole_weight = torch.randn(64, 32).bfloat16(), torch.randn(100, 32).bfloat16()
    targets = torch.randint(100, (64,))

    def work(rank: int) -> list[Tensor]:
        group = world(rank, len(split))
        x = whole_x.clone().requires_grad_()
        own, begin = own_part(whole_weight, split, rank)

        def loss() -> Tensor:
            return vocab_parallel_cross_entropy(x, own, targets, begin, group)

        found = loss()
        return [found.detach(), *torch.autograd.grad(found, (x, own)), *torch.autograd.grad(loss() * scale, (x, own))]

    results = run_ranks(len(split), work)
    exact = [y.double().requires_grad_() for y in (whole_x, whole_weight)]
    loss, grad_x, grad_weight = reference(*exact, targets)
    for found, *grads in results:
        assert found.dtype == torch.float32
        assert {grad.dtype for grad in grads} == {torch.bfloat16}
        # What the matmul rounds to bf16, one process rounds too; the sums over the vocabulary are not rounded.
        logits = (whole_x @ whole_weight.t()).float()
        assert found.item() == pytest.approx(F.cross_entropy(logits, targets, reduction="sum").item(), rel=1e-6)
    for index, wanted, join in ((1, grad_x, lambda parts: sum(p.double() for p in parts)), (2, grad_weight, torch.cat)):
        one = join([result[index] for result in results]).double()
        scaled = join([result[index + 2] for result in results]).double()
        assert (one - wanted).norm() / wanted.norm() < 2e-2
        assert ((scaled * one).sum() / one.square().sum()).item() == pytest.approx(scale, rel=1e-3)
    assert loss.item() == pytest.approx(results[0][0].item(), rel=5e-3)


class _Operations(TorchDispatchMode):
    """Names of all operations, and shapes of all tensors that they make."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.shapes: set[torch.Size] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.names.add(func.overloadpacket.__name__)
        self.shapes |= {leaf.shape for leaf in tree_leaves(out) if isinstance(leaf, Tensor)}
        return out


def test_logits_never_exist_as_a_whole_and_only_gradients_are_kept(
    run_ranks: RunRanks, monkeypatch: pytest.MonkeyPatch
) -> None:
    split, tokens, chunk = (4, 7), 10, 3
    monkeypatch.setattr(module, "_CHUNK", chunk)

    def work(rank: int) -> None:
        group = world(rank, 2)
        x, weight, targets = problem(tokens)
        own, begin = own_part(weight, split, rank)
        kept = list[torch.Size]()

        def keep(tensor: Tensor) -> Tensor:
            kept.append(tensor.shape)
            return tensor

        with _Operations() as done, saved_tensors_hooks(keep, lambda tensor: tensor):
            vocab_parallel_cross_entropy(x, own, targets, begin, group)
        heights = {shape[0] for shape in done.shapes if len(shape) == 2 and shape[1] == split[rank]}
        assert max(heights - {HIDDEN}) == chunk  # [HIDDEN, v] is the transposed weight
        assert kept == [x.shape, own.shape]

    run_ranks(2, work)


def test_evaluation_makes_no_gradients(run_ranks: RunRanks) -> None:
    split = (4, 7)

    def work(rank: int) -> None:
        group = world(rank, 2)
        x, weight, targets = problem(4)
        own, begin = own_part(weight, split, rank)
        trained = vocab_parallel_cross_entropy(x, own, targets, begin, group)
        gradients = {"scatter_add_", "addmm_", "zeros_like"}
        with _Operations() as done, torch.no_grad():
            loss = vocab_parallel_cross_entropy(x, own, targets, begin, group)
        assert "exp_" in done.names and not done.names & gradients
        assert torch.equal(loss, trained) and not loss.requires_grad

    run_ranks(2, work)


@pytest.mark.parametrize("frozen", ["x", "weight"])
def test_one_side_frozen(frozen: str, run_ranks: RunRanks) -> None:
    split = (4, 7)

    def work(rank: int) -> None:
        group = world(rank, 2)
        x, weight, targets = problem(7)
        _, grad_x, grad_weight = reference(x, weight, targets)
        own, begin = own_part(weight, split, rank)
        (x if frozen == "x" else own).requires_grad_(False)
        vocab_parallel_cross_entropy(x, own, targets, begin, group).backward()
        if frozen == "x":
            assert x.grad is None
            torch.testing.assert_close(own.grad, grad_weight[slice(*rows(split, rank))])
        else:
            assert own.grad is None
            torch.testing.assert_close(group.all_reduce(x.grad), grad_x)

    run_ranks(2, work)
