"""Tokens that travel to their experts come back as one process with all experts would have computed them.

The oracle is `LocalDispatcher` over the tokens of the whole block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from moeforge.config.model import ModelConfig, MoEConfig
from moeforge.kernels import expert_mlp, expert_permutation
from moeforge.kernels.permute import Permutation
from moeforge.layout import Layout, build_layout
from moeforge.model import LocalDispatcher
from moeforge.model.recompute import recomputed
from moeforge.parallel import Group, Mesh, Traffic, Watchdog
from moeforge.parallel import dispatcher as module
from moeforge.parallel.dispatcher import AllGatherDispatcher, AllToAllDispatcher, make_dispatcher

RunRanks = Callable[..., list[Any]]
CPU = torch.device("cpu")
WIDTH, TOKENS, LAYERS = 8, 7, 2

# experts, columns, sizes of the layout
LAYOUTS: dict[str, tuple[int, int, dict[str, Any]]] = {
    "edp, 2 ranks": (4, 6, {"tp": 2}),
    "edp, 16 experts as 6, 5, 5": (16, 6, {"tp": 3}),
    "edp, 4 ranks, one without experts": (3, 6, {"tp": 4}),
    "edp, two blocks": (5, 6, {"tp": 2, "dp": 2}),
    "ep over dp": (5, 6, {"dp": 3, "ep": 3}),
    "ep over dp and tp": (6, 6, {"dp": 2, "tp": 2, "ep": 4}),
    "etp, uneven columns": (4, 7, {"tp": 3, "ep": 1, "etp": 3}),
    "etp, a rank without columns": (4, 2, {"tp": 3, "ep": 1, "etp": 3}),
    "ep2 etp2": (3, 7, {"tp": 2, "dp": 2, "ep": 2, "etp": 2}),
    "ep2 etp2, wide": (3, 16, {"tp": 2, "dp": 2, "ep": 2, "etp": 2}),  # widths that grouped matmuls take
}
QUICK = ("edp, 16 experts as 6, 5, 5", "edp, 4 ranks, one without experts", "etp, a rank without columns", "ep2 etp2")
ROUTINGS = ("random", "dropping", "one rank's experts", "nothing kept", "one rank drops all")


class Problem(NamedTuple):
    """One rank's inputs, and the gradient of its output."""

    x_TD: Tensor
    weights_TK: Tensor
    experts_TK: Tensor
    kept_TK: Tensor | None
    grad_TD: Tensor


def layout_of(case: str) -> tuple[ModelConfig, Layout]:
    experts, columns, sizes = LAYOUTS[case]
    config = ModelConfig(
        vocab_size=11, hidden_size=WIDTH, num_layers=LAYERS, num_heads=4, num_kv_heads=4, head_dim=2, ffn_size=columns,
        moe=MoEConfig(experts, 2, columns),
    )  # fmt: skip
    return config, build_layout(config, **sizes)


def problem(rank: int, experts: int, routing: str, dtype: torch.dtype = torch.float64) -> Problem:
    made = torch.Generator().manual_seed(rank)
    x = torch.randn(TOKENS, WIDTH, generator=made, dtype=torch.float64).to(dtype)
    weights = torch.rand(TOKENS, 2, generator=made, dtype=torch.float64)
    chosen = torch.rand(TOKENS, experts, generator=made).argsort(1)[:, :2]
    grad = torch.randn(TOKENS, WIDTH, generator=made, dtype=torch.float64).to(dtype)
    kept: Tensor | None = torch.rand(TOKENS, 2, generator=made) < 0.6
    if routing == "random":
        kept = None
    elif routing == "one rank's experts":  # most ranks receive nothing
        chosen, kept = torch.tensor([[1, 0]] * TOKENS), None
    elif routing == "nothing kept" or (routing == "one rank drops all" and rank == 1):
        kept = torch.zeros(TOKENS, 2, dtype=torch.bool)
    return Problem(x, weights if dtype == torch.float64 else weights.float(), chosen, kept, grad)


def expert_weights(experts: int, columns: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Of all experts: w13 [E, 2, F, D], w2 [E, D, F]."""
    made = torch.Generator().manual_seed(99)
    w13 = torch.randn(experts, 2, columns, WIDTH, generator=made, dtype=torch.float64)
    w2 = torch.randn(experts, WIDTH, columns, generator=made, dtype=torch.float64)
    return w13.to(dtype), w2.to(dtype)


def routed(
    dispatcher: Any, layer: int, inputs: Problem, experts: int, w13: Tensor, w2: Tensor, again: bool = False
) -> tuple[Tensor, ...]:
    """Output, then gradients of x, gate weights, w13 and w2; `again`: activations are recomputed."""
    leaves = [each.detach().clone().requires_grad_() for each in (inputs.x_TD, inputs.weights_TK, w13, w2)]

    def forward(x: Tensor, weights: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
        def mlp(rows: Tensor, offsets: Tensor) -> Tensor:
            return expert_mlp(rows, w13.flatten(1, 2), w2, offsets)

        out: Tensor = dispatcher.route(layer, x, weights, inputs.experts_TK, inputs.kept_TK, experts, mlp)
        return out

    class Unit(nn.Module):
        def forward(self, *inputs: Tensor) -> Tensor:
            return forward(*inputs)

    out = recomputed(Unit(), *leaves) if again else forward(*leaves)
    out.backward(inputs.grad_TD)
    return (out.detach(), *(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves))


def expected(mesh: Mesh, layer: int, case: str, routing: str, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """What `routed` must give on this rank, from all tokens of its block and all experts in one process."""
    experts, columns, _ = LAYOUTS[case]
    each = [problem(rank, experts, routing, dtype) for rank in mesh.block.ranks]
    kept = [torch.ones_like(p.experts_TK, dtype=torch.bool) if p.kept_TK is None else p.kept_TK for p in each]
    whole = Problem(
        *(torch.cat([p[i] for p in each]) for i in range(3)), torch.cat(kept), torch.cat([p.grad_TD for p in each])
    )
    w13, w2 = expert_weights(experts, columns, dtype)
    out, x, weights, grad_w13, grad_w2 = routed(LocalDispatcher(), layer, whole, experts, w13, w2)
    own = slice(mesh.block.index * TOKENS, (mesh.block.index + 1) * TOKENS)
    return out[own], x[own], weights[own], *local_part(mesh, layer, grad_w13, grad_w2)


def local_part(mesh: Mesh, layer: int, w13: Tensor, w2: Tensor) -> tuple[Tensor, Tensor]:
    shard = mesh.layout.expert_ranks[mesh.at.expert_rank]
    held, columns = slice(*shard.experts[layer]), slice(*shard.columns[layer])
    return w13[held, :, columns], w2[held, :, columns]


def variants(mesh: Mesh) -> Iterator[tuple[str, Any]]:
    for chunks in (1, 2, 3, TOKENS + 2):
        yield f"all-to-all in {chunks}", AllToAllDispatcher(mesh, chunks)
    yield "all-gather", AllGatherDispatcher(mesh)


def close(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...], tolerance: float, label: str) -> None:
    for name, a, b in zip(("out", "x", "weights", "w13", "w2"), found, wanted, strict=True):
        torch.testing.assert_close(
            a, b, rtol=tolerance, atol=tolerance / 100, msg=lambda m, at=f"{label}, {name}: ": at + m
        )


def _against_one_process(rank: int, case: str) -> None:
    experts, columns, _ = LAYOUTS[case]
    mesh = Mesh.create(layout_of(case)[1], CPU)
    for i, routing in enumerate(ROUTINGS):
        layer = i % LAYERS  # what is left over of experts and columns goes to another rank in each
        local = local_part(mesh, layer, *expert_weights(experts, columns))
        inputs, wanted = problem(rank, experts, routing), expected(mesh, layer, case, routing)
        plain = None
        for name, dispatcher in variants(mesh):
            found = routed(dispatcher, layer, inputs, experts, *local)
            close(found, wanted, 1e-9, f"{routing}, {name}")
            if isinstance(dispatcher, AllToAllDispatcher):  # overlap on and off
                plain = plain or found
                close(found, plain, 1e-12, f"{routing}, {name} against one chunk")
            if routing == "dropping":
                again = routed(dispatcher, layer, inputs, experts, *local, again=True)
                assert all(map(torch.equal, found, again)), f"{routing}, {name}, recomputed"


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[] if case in QUICK else pytest.mark.slow) for case in LAYOUTS]
)
def test_equal_to_one_process(run_ranks: RunRanks, case: str) -> None:
    run_ranks(layout_of(case)[1].world_size, _against_one_process, case)


def _other_precisions(rank: int, case: str) -> None:
    experts, columns, _ = LAYOUTS[case]
    mesh = Mesh.create(layout_of(case)[1], CPU)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        local = local_part(mesh, 0, *expert_weights(experts, columns, dtype))
        for routing in ("random", "dropping"):
            inputs, exact = problem(rank, experts, routing, dtype), expected(mesh, 0, case, routing)
            for name, dispatcher in variants(mesh):
                found = routed(dispatcher, 0, inputs, experts, *local)
                assert [each.dtype for each in found] == [dtype, dtype, torch.float32, dtype, dtype]
                for a, b in zip(found, exact, strict=True):
                    assert (a.double() - b).norm() <= tolerance * b.norm(), f"{dtype}, {routing}, {name}"


@pytest.mark.parametrize("case", ["edp, 4 ranks, one without experts", "etp, a rank without columns", "ep2 etp2, wide"])
def test_other_precisions(run_ranks: RunRanks, case: str) -> None:
    run_ranks(layout_of(case)[1].world_size, _other_precisions, case)


def largest(experts_TK: Tensor, num_experts: int, kept_TK: Tensor | None = None, alignment: int = 32) -> Permutation:
    """`expert_permutation` as on a GPU: its buffer has the largest possible size, the last expert takes the rest."""
    exact = expert_permutation(experts_TK, num_experts, kept_TK, alignment)
    rows = (experts_TK.numel() + num_experts * (alignment - 1)) // alignment * alignment
    row_TK = exact.row_TK
    if kept_TK is not None:
        rows += alignment
        row_TK = row_TK.where(kept_TK, rows - 1)
    if len(experts_TK) == 0:
        rows = 0
    source_R = torch.cat([exact.source_R, exact.source_R.new_zeros(rows - len(exact.source_R))])
    offsets_E = exact.offsets_E.clone()
    offsets_E[-1] = rows
    return Permutation(source_R, row_TK, offsets_E)


def _buffers_of_a_gpu(rank: int, case: str) -> None:
    experts, columns, _ = LAYOUTS[case]
    mesh = Mesh.create(layout_of(case)[1], CPU)
    local = local_part(mesh, 1, *expert_weights(experts, columns))
    for routing in ROUTINGS:
        inputs, wanted = problem(rank, experts, routing), expected(mesh, 1, case, routing)
        module.expert_permutation = largest  # type: ignore[attr-defined]
        for name, dispatcher in variants(mesh):
            close(routed(dispatcher, 1, inputs, experts, *local), wanted, 1e-9, f"{routing}, {name}")
        module.expert_permutation = expert_permutation  # type: ignore[attr-defined]


@pytest.mark.parametrize("case", ["edp, 16 experts as 6, 5, 5", "ep2 etp2"])
def test_equal_with_the_buffers_of_a_gpu(run_ranks: RunRanks, case: str) -> None:
    run_ranks(layout_of(case)[1].world_size, _buffers_of_a_gpu, case)


@pytest.mark.parametrize("alignment", [1, 4])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_cut_buffers_are_as_large_as_on_the_cpu(alignment: int, share: float) -> None:
    torch.manual_seed(0)
    experts, kept = torch.randint(5, (13, 2)), torch.rand(13, 2) < share
    wanted = expert_permutation(experts, 5, kept, alignment)
    for permutation in (wanted, largest(experts, 5, kept, alignment)):
        found = module._cut(permutation, kept, alignment)
        assert all(map(torch.equal, found, wanted))


def _traffic(rank: int, case: str, chunks: int) -> None:
    experts, columns, _ = LAYOUTS[case]
    layout = layout_of(case)[1]
    mesh = Mesh.create(layout, CPU, local_world_size=2)
    local = local_part(mesh, 0, *expert_weights(experts, columns))
    block = mesh.block.ranks
    each = {other: problem(other, experts, "dropping") for other in block}
    held = [shard.experts[0] for shard in layout.expert_ranks]

    def rows(source: int, target: int) -> int:
        """Assignments of `source` whose expert, or a part of it, is on `target`: counted one by one."""
        begin, end = held[block.index(target)]
        p = each[source]
        assert p.kept_TK is not None
        return sum(
            begin <= int(p.experts_TK[t, k]) < end and bool(p.kept_TK[t, k]) for t in range(TOKENS) for k in range(2)
        )

    def sent(operation: str, link: str) -> int:
        return sum(n for route, n in mesh.traffic.sent.items() if route == ("block", operation, link))

    routed(AllToAllDispatcher(mesh, chunks), 0, each[rank], experts, *local)
    peers = {
        "intra-node": [other for other in block if other != rank and other // 2 == rank // 2],
        "inter-node": [other for other in block if other // 2 != rank // 2],
    }
    for link, others in peers.items():
        # There and back, of tokens and of gradients: what I send for my tokens, and what I return to others.
        travelled = 2 * sum(rows(rank, other) + rows(other, rank) for other in others)
        assert sent("all_to_all", link) == travelled * WIDTH * 8
        assert sent("all_gather", link) == len(others) * chunks * experts * 8
    mesh.traffic.sent.clear()
    routed(AllGatherDispatcher(mesh), 0, each[rank], experts, *local)
    hidden, gates = TOKENS * WIDTH * 8, TOKENS * 2 * 8
    for link, others in peers.items():
        # Gathered: tokens, gate weights, chosen experts, and the output's gradient; scattered: output, two gradients.
        assert sent("all_gather", link) == len(others) * (2 * hidden + 2 * gates)
        assert sent("reduce_scatter", link) == len(others) * (2 * hidden + gates)
        assert sent("all_to_all", link) == 0


@pytest.mark.parametrize(
    ("case", "chunks"), [("edp, 4 ranks, one without experts", 1), ("ep2 etp2", 3), ("edp, two blocks", 2)]
)
def test_bytes_are_those_of_the_routing(run_ranks: RunRanks, case: str, chunks: int) -> None:
    run_ranks(4, _traffic, case, chunks)


def mesh_of(layout: Layout) -> Mesh:
    """A mesh that is only looked at."""
    traffic, watchdog = Traffic(1), Watchdog()
    return Mesh(layout, 0, CPU, lambda name, ranks: Group(name, ranks, 0, None, traffic, watchdog))


@pytest.mark.parametrize(
    ("case", "top_k", "chunks", "kind"),
    [
        ("edp, 2 ranks", 2, 1, AllGatherDispatcher),
        ("edp, 2 ranks", 2, 2, AllToAllDispatcher),  # overlap asks for chunks
        ("edp, 2 ranks", 1, 1, AllToAllDispatcher),
        ("edp, 4 ranks, one without experts", 2, 1, AllToAllDispatcher),
        ("ep2 etp2", 2, 1, AllGatherDispatcher),  # every row goes to both halves of its expert
    ],
)
def test_auto_takes_what_sends_less(case: str, top_k: int, chunks: int, kind: type) -> None:
    mesh = mesh_of(layout_of(case)[1])
    assert type(make_dispatcher(mesh, top_k, "auto", chunks)) is kind
    assert type(make_dispatcher(mesh, top_k, "allgather")) is AllGatherDispatcher
    assert type(make_dispatcher(mesh, top_k, "alltoall", chunks)) is AllToAllDispatcher


def test_one_rank_needs_no_travel() -> None:
    config, _ = layout_of("edp, 2 ranks")
    for layout in (Layout.single(config), build_layout(replace(config), dp=2, tp=2, ep=1)):
        for kind in ("auto", "alltoall", "allgather"):
            assert type(make_dispatcher(mesh_of(layout), 2, kind)) is LocalDispatcher
