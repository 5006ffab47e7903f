"""What the planner says that units compute and send, against real training steps: bytes that ranks count as they send
them (`parallel.traffic`), FLOPs that torch counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from moeforge.bench.unit_times import UnitTimer
from moeforge.config.clusters import load_hardware
from moeforge.config.model import ModelConfig, MoEConfig
from moeforge.config.presets import model_preset
from moeforge.layout import build_layout, unit_names
from moeforge.model import DenseAttention, ForwardContext, RouterRecord, RoutingGroups, Transformer
from moeforge.parallel import Mesh
from moeforge.parallel.dispatcher import make_dispatcher
from moeforge.parallel.executor import MicroBatch
from moeforge.parallel.parameters import ParameterPart, parameter_parts
from moeforge.parallel.pipeline import make_executor
from moeforge.parallel.shard import TensorParallelShard
from moeforge.plan.cost import model_flops_per_token, unit_cost
from moeforge.plan.estimate import Estimator
from moeforge.plan.workload import Workload
from moeforge.train.optimizer import MODEL_DTYPE, Optimizer

CPU = torch.device("cpu")
SEQUENCES, POSITIONS, MICRO_BATCHES = 2, 256, 2
MOE = MoEConfig(num_experts=8, top_k=2, expert_size=64, gate_norm=1.0, router_bias=True, layer_frequency=2)
MODEL = ModelConfig(
    vocab_size=4096, hidden_size=32, num_layers=4, num_heads=8, num_kv_heads=4, head_dim=8, ffn_size=64,
    max_positions=POSITIONS, moe=MOE,
)  # fmt: skip
Sent = Counter[tuple[str, str]]
"""Bytes by group and link."""


@dataclass(frozen=True)
class Step:
    """A step of `work` on a rank."""

    work: Workload
    mesh: Mesh
    optimizer: Optimizer
    run: Callable[[], Any]


def step_of(work: Workload, mesh: Mesh) -> Step:
    """Random weights and tokens; data-parallel ranks have other tokens."""
    model, layout, chunks = work.model, mesh.layout, list[Transformer]()
    parameters, parts = dict[str, torch.nn.Parameter](), dict[str, ParameterPart]()
    torch.manual_seed(0)
    whole = Transformer(model)
    whole.reset_parameters()
    with torch.no_grad():  # routes then depend on a token alone, not on its sequence: choices are independent
        whole.get_parameter("embed.weight").mul_(100)
    for stage in mesh.stages:
        chunks.append(Transformer(model, layout, stage, mesh.at.tp, mesh.at.expert_rank))
        parts |= parameter_parts(model, layout, stage, mesh.at.tp, mesh.at.expert_rank)
        with torch.no_grad():
            for name, parameter in chunks[-1].named_parameters():
                parameter.copy_(parts[name].cut(whole.get_parameter(name)))
        parameters |= dict(chunks[-1].to(MODEL_DTYPE[work.precision]).named_parameters())
    optimizer = Optimizer(parameters, parts, mesh, zero=work.zero, masters=work.precision == "bf16")
    executor = make_executor(chunks, mesh, MODEL_DTYPE[work.precision], optimizer.collect)
    dispatcher = make_dispatcher(mesh, model.moe.top_k if model.moe else 1, overlap_chunks=work.overlap_chunks)
    shard, alpha = TensorParallelShard(mesh, work.tokens), torch.full((len(model.moe_layers),), 0.01).double()
    made, batches = torch.Generator().manual_seed(mesh.at.dp), list[MicroBatch]()
    record = None
    if model.moe is not None:
        record = RouterRecord(model.moe_layers, model.moe.num_experts, work.micro_batches, alpha, work.tokens)
    for i in range(work.micro_batches):
        tokens = torch.randint(0, model.vocab_size, (work.tokens,), generator=made)
        groups = None if record is None else RoutingGroups(work.micro_batch_sequences)
        attention = DenseAttention(work.micro_batch_sequences, work.sequence_length)
        context = ForwardContext(attention, dispatcher, shard, groups, record, i)
        positions = torch.arange(work.sequence_length).repeat(work.micro_batch_sequences)
        batches.append(MicroBatch(tokens, positions, tokens.roll(-1), context, 1 / work.tokens))
    return Step(work, mesh, optimizer, lambda: executor.train(batches))


def workload(model: ModelConfig, precision: str = "fp32", **sizes: Any) -> Workload:
    batch = SEQUENCES * MICRO_BATCHES * sizes.get("dp", 1)
    return Workload(model, precision, POSITIONS, SEQUENCES, batch, **sizes)


def sent(rank: int, work: Workload, per_node: int) -> tuple[Sent, Sent]:
    """What this rank sends in a step, and of it what all-to-alls carry."""
    layout = build_layout(work.model, dp=work.dp, tp=work.tp, ep=work.ep, etp=work.etp)
    step = step_of(work, Mesh.create(layout, CPU, local_world_size=per_node))
    step.run()
    step.optimizer.step(1e-3)
    total, routed = Sent(), Sent()
    for route, size in step.mesh.traffic.sent.items():
        if route.group != "world":  # gradient norm
            (routed if route.operation == "all_to_all" else total)[route.group, route.link] += size
    return total, routed


def predicted(work: Workload, nodes: int, per_node: int) -> tuple[Sent, Sent]:
    """The same, of all ranks together."""
    estimator = Estimator(load_hardware(f"{nodes}x{per_node}-cpu"), work)
    total, routed = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    for name in unit_names(work.model):
        cost = unit_cost(work, name)
        messages = (cost.forward.messages + cost.backward.messages) * work.micro_batches + cost.update.messages
        for message in messages:
            found, across = routed if message.operation == "all_to_all" else total, estimator.outside_bytes(message)
            found[message.group, "inter-node"] += across * work.dp * work.tp
            found[message.group, "intra-node"] += (message.bytes - across) * work.dp * work.tp
    return +total, +routed


MODES = {"edp": {"ep": 2, "etp": 1}, "ep": {"ep": 4, "etp": 1}, "etp": {"ep": 2, "etp": 2}, "copies": {}}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    **{mode: ({}, sizes) for mode, sizes in MODES.items()},
    **{f"{mode}, in 3 chunks": ({}, {**sizes, "overlap_chunks": 3}) for mode, sizes in MODES.items()},
    "edp, bf16": ({}, {**MODES["edp"], "precision": "bf16"}),
    "ep, fp64": ({}, {**MODES["ep"], "precision": "fp64"}),
    "etp, without zero": ({}, {**MODES["etp"], "zero": False}),
    "edp, norms over all heads, biases, tied": (
        {"qk_norm": "full", "qkv_bias": True, "output_bias": True, "tie_embeddings": True}, MODES["edp"],
    ),
    "dense": ({"moe": None}, {}),
}  # fmt: skip
QUICK = ("edp", "ep", "etp", "etp, in 3 chunks", "edp, norms over all heads, biases, tied")


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[] if case in QUICK else pytest.mark.slow) for case in CASES]
)
def test_bytes_of_a_step_of_four_ranks_on_two_nodes(run_ranks: Callable[..., list[Any]], case: str) -> None:
    changes, sizes = CASES[case]
    work = workload(replace(MODEL, **changes), **{"dp": 2, "tp": 2, "ep": 1, "etp": 1, **sizes})
    found, wanted = run_ranks(4, sent, work, 2), predicted(work, 2, 2)
    for rank, (total, _) in enumerate(found):  # sizes divide: all ranks send as much
        assert total == found[0][0], rank
    total = sum((each for each, _ in found), Sent())
    # Without ZeRO gradients are summed over whole buckets, so that less is filled up than unit by unit.
    assert total == wanted[0] if work.zero else total == pytest.approx(wanted[0], rel=1e-3)

    routed = sum((each for _, each in found), Sent())
    if work.model.moe is None or work.block == 1 or work.gathers_tokens:
        assert not routed and not wanted[1]
        return
    # Who is sent a token is chance. Rank i's tokens go to rank j with some probability p_j: over all i and j that
    # adds up to what equal p_j give. What remains is the chance of N choices: four standard deviations of their mean.
    choices = work.tokens * work.model.moe.top_k * len(work.model.moe_layers) * work.dp * work.micro_batches
    assert routed == pytest.approx(wanted[1], rel=4 / choices**0.5)
    assert bool(routed["block", "inter-node"]) == (work.block > work.tp)


def test_bytes_where_nothing_divides(run_ranks: Callable[..., list[Any]]) -> None:
    """Tokens are filled up to equal shares, so they are exact; weights are those of the rank with most."""
    work = replace(
        workload(replace(MODEL, moe=replace(MOE, num_experts=7)), tp=3, ep=3),
        sequence_length=POSITIONS - 1, micro_batch_sequences=1, batch_sequences=2,
    )  # fmt: skip
    found, (wanted, _) = run_ranks(3, sent, work, 3), predicted(work, 1, 3)
    total = sum((each for each, _ in found), Sent())
    for group in ("tp", "block"):
        assert total[group, "intra-node"] == pytest.approx(wanted[group, "intra-node"], rel=1e-4)
    assert total["dp_tp", "intra-node"] == wanted["dp_tp", "intra-node"]


def test_imbalance_and_overlap() -> None:
    work = workload(MODEL, dp=2, tp=2, ep=4)
    plain, worse = (unit_cost(each, "layers.1.ffn") for each in (work, replace(work, imbalance=1.5)))

    def of_experts(cost: Any) -> float:
        return sum(matmul.flops * matmul.times for matmul in cost.forward.matmuls[1:])

    assert of_experts(worse) == 1.5 * of_experts(plain)
    travel = [m for m in worse.forward.messages if m.operation == "all_to_all"]
    assert [m.bytes for m in travel] == [work.own_tokens * 2 * 3 / 4 * 32 * 4 * 1.5] * 2
    chunked = unit_cost(replace(work, overlap_chunks=4), "layers.1.ffn").forward
    assert chunked.flops == pytest.approx(plain.forward.flops) and chunked.matmuls[1].times == 4 * 2
    assert [(m.times, m.overlapped) for m in chunked.messages if m.operation == "all_to_all"] == [(4, True)] * 2


def _attention(q: Any, k: Any, v: Any, *rest: Any, out_shape: Any = None, **options: Any) -> int:
    return int(sdpa_flop_count(q, q, q))  # each query head with a key of its own: it counts no grouped ones


def _attention_backward(grad: Any, q: Any, *rest: Any, out_shape: Any = None, **options: Any) -> int:
    return int(sdpa_backward_flop_count(q, q, q, q))


ATTENTION_FLOPS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


def flops_of(work: Workload) -> int:
    """Of forward and backward of one micro-batch, as torch counts them; attention in full."""
    step = step_of(replace(work, batch_sequences=SEQUENCES), Mesh.single(build_layout(work.model), CPU))
    with FlopCounterMode(display=False, custom_mapping=ATTENTION_FLOPS) as counter:
        step.run()
    return int(counter.get_total_flops())


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp64"])
@pytest.mark.parametrize("changes", [{"moe": None}, {}, {"moe": replace(MOE, num_experts=5, layer_frequency=1)}])
def test_flops_of_a_step_in_one_process(changes: dict[str, Any], precision: str) -> None:
    model = replace(MODEL, num_layers=2, **changes)
    work = workload(model, precision)
    costs = [unit_cost(work, name) for name in unit_names(model)]
    wanted = sum(cost.forward.flops + cost.backward.flops for cost in costs)
    # Attention to all positions instead of those before: two products forward, five backward.
    beyond = POSITIONS**2 - POSITIONS * (POSITIONS + 1) // 2
    wanted += model.num_layers * SEQUENCES * model.num_heads * 2 * model.head_dim * beyond * 7
    # bf16 rows of an expert are filled up to a multiple of 32; three products forward, six backward.
    filled = 0
    if precision == "bf16" and model.moe is not None:
        filled = len(model.moe_layers) * model.moe.num_experts * 31 * 9 * 2 * model.hidden_size * model.moe.expert_size
    assert wanted <= flops_of(work) <= wanted + filled


def test_halves_done_apart_are_the_whole() -> None:
    work = workload(MODEL, dp=2, tp=2, ep=2)
    for unit in ("layers.0.attention", "layers.0.ffn", "layers.1.ffn", "head"):
        cost = unit_cost(work, unit)
        assert cost.backward_input.flops + cost.backward_weight.flops == cost.backward.flops
        assert cost.backward_input.messages == cost.backward.messages and not cost.backward_weight.messages


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_flops_of_each_half_done_apart(precision: str) -> None:
    """torch's split backward computes every gradient once: those of the inputs, then those of the weights."""
    model = replace(MODEL, num_layers=2, tie_embeddings=True)
    work = workload(model, precision)
    timer = UnitTimer(model, precision, SEQUENCES, POSITIONS)
    x, runs = timer.tokens_T, []
    for name, unit in timer.model.units():
        with FlopCounterMode(display=False, custom_mapping=ATTENTION_FLOPS) as forward:
            y = unit(x, timer.rotary, timer.context)
            if name == "head":
                y = timer.model.loss(y, timer.tokens_T, timer.context).reshape(1) * 1.0
        runs.append((name, timer._weights(unit), x, y, forward.get_total_flops()))
        x = y.detach().requires_grad_()
    grads = None
    for name, weights, x, y, forward_flops in reversed(runs[1:]):
        with FlopCounterMode(display=False, custom_mapping=ATTENTION_FLOPS) as for_input:
            _, groups = stage_backward_input([y], grads, [x], iter(weights))
        with FlopCounterMode(display=False, custom_mapping=ATTENTION_FLOPS) as for_weights:
            stage_backward_weight(iter(weights), groups)
        grads = [x.grad]
        found = for_input.get_total_flops(), for_weights.get_total_flops()
        assert all(weight.grad is not None for weight in weights)
        if name == "head":
            assert found == (0, 0)
        elif name.endswith("ffn"):
            assert found == (forward_flops, forward_flops)
            assert forward_flops >= unit_cost(work, name).forward.flops
        else:
            linear = unit_cost(work, name).backward_weight.flops
            # Two products forward, five backward.
            assert found == (linear + 2.5 * (forward_flops - linear), linear)


def test_model_flops_of_skywork_moe() -> None:
    """Their 690 tokens/s/GPU on 312 TFLOP/s (SKYWORK.md, section 4)."""
    model = model_preset("skywork-moe")
    work = Workload(model, "bf16", 8192, 1, 1)
    assert model_flops_per_token(work, "none") == pytest.approx(6 * 22.39e9, rel=1e-4)
    attention = model_flops_per_token(work) - model_flops_per_token(work, "none")
    assert attention == 6 * 52 * 4608 * 8192
    for convention, percent in (("none", 29.7), ("causal", 32.3), ("full", 34.9)):
        assert 690 * model_flops_per_token(work, convention) / 312e12 == pytest.approx(percent / 100, abs=5e-4)
