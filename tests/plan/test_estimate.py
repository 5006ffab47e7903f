"""Seconds of matmuls, collectives and units on given hardware."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from moeforge.config.clusters import load_hardware
from moeforge.config.hardware import (
    HardwareProfile,
    Link,
    MatmulRate,
    MeasuredModel,
    MeasuredUnit,
    layer_fingerprint,
)
from moeforge.config.model import ModelConfig, MoEConfig
from moeforge.errors import UserError
from moeforge.layout import unit_names
from moeforge.plan.cost import GroupName, Matmul, Message, Pass, unit_cost
from moeforge.plan.estimate import Estimator
from moeforge.plan.workload import Workload

MODEL = ModelConfig(
    vocab_size=64, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=4, head_dim=8, ffn_size=64,
    moe=MoEConfig(num_experts=8, top_k=2, expert_size=64, layer_frequency=2),
)  # fmt: skip
WORK = Workload(MODEL, "fp32", 64, 1, 8)
PROFILE = HardwareProfile(
    name="plain", nodes=4, devices_per_node=4, memory_gbytes=10.0, peak_tflops={"fp32": 10.0},
    matmul={"fp32": (MatmulRate(flops=1e6, tflops=1.0), MatmulRate(flops=1e8, tflops=3.0),
                     MatmulRate(flops=1e9, tflops=4.0))},
    memory_gbytes_per_second=100.0, unit_overhead_us=7.0,
    intra_node=Link(gbytes_per_second=50.0, latency_us=10.0), inter_node=Link(gbytes_per_second=5.0, latency_us=20.0),
)  # fmt: skip


def estimator(hardware: HardwareProfile = PROFILE, work: Workload = WORK) -> Estimator:
    return Estimator(hardware, work)


def test_rates_between_and_beyond_the_measured_sizes() -> None:
    found = estimator()
    assert [found.rate(size) for size in (1e6, 1e8, 1e9)] == pytest.approx([1e12, 3e12, 4e12])
    assert found.rate(1e7) == pytest.approx(2e12)  # half way from 1e6 to 1e8 in its logarithm
    assert found.rate(1e15) == 4e12
    # Below the smallest time falls with the root of the size.
    assert 1e4 / found.rate(1e4) == pytest.approx(1e6 / 1e12 / 10)
    assert found.rate(0) == 1e12
    seconds = [size / found.rate(size) for size in (1e3, 1e5, 1e6, 3e6, 1e7, 1e8, 3e8, 1e9, 1e10)]
    assert seconds == sorted(seconds)


def test_a_pass_adds_up() -> None:
    done = Pass((Matmul(1e6, 2), Matmul(1e8)), 1e9, (Message("tp", "all_gather", 1e9),))
    found = estimator(work=replace(WORK, tp=4, ep=4))
    expected = 2e-6 + 1e8 / 3e12 + 1e9 / 100e9 + (1e9 / 50e9 + 2 * 10e-6) + 7e-6
    assert found.seconds(done) == pytest.approx(expected)
    assert found.seconds(Pass()) == 0.0


@pytest.mark.parametrize(
    ("operation", "size", "stride", "seconds"),
    [
        ("all_gather", 1, 1, 0.0),
        ("all_gather", 4, 1, 1 / 50 + 2 * 10e-6),
        # A ring over four members a node leaves by four links.
        ("all_gather", 16, 1, 1 / (4 * 5) + 4 * 20e-6),
        ("reduce_scatter", 8, 2, 1 / (2 * 5) + 3 * 20e-6),
        ("all_reduce", 4, 4, 1 / 5 + 2 * 2 * 20e-6),
        ("all_to_all", 4, 1, 1 / 50 + 10e-6),
        # Of 15 peers 12 are outside: every rank by its own link.
        ("all_to_all", 16, 1, 12 / 15 / 5 + 20e-6),
    ],
)
def test_collectives_of_a_gigabyte(operation: str, size: int, stride: int, seconds: float) -> None:
    assert estimator().collective(operation, size, stride, 1e9) == pytest.approx(seconds)


def test_latency_counts_as_often_as_messages_and_shares_of_them_travel() -> None:
    found = estimator(work=replace(WORK, tp=4, ep=4))
    one, ten, shared = (found.message(Message("tp", "all_gather", 1e6, times)) for times in (1, 10, 0.1))
    assert (ten - one, one - shared) == pytest.approx((9 * 20e-6, 0.9 * 20e-6))


def placed(devices: int, per_node: int, size: int, stride: int) -> tuple[int, float]:
    """Fewest members of a group on one node, and mean share of peers outside, rank by rank."""
    least, shares = size, []
    for rank in range(devices):
        width = size * stride
        begin = rank // width * width + rank % stride
        nodes = [(begin + i * stride) // per_node for i in range(size)]
        least = min(least, *Counter(nodes).values())
        shares.append(sum(node != rank // per_node for node in nodes) / (size - 1))
    return least, sum(shares) / len(shares)


@pytest.mark.parametrize(
    ("nodes", "per_node", "size", "stride"),
    [(4, 4, 2, 1), (4, 4, 8, 1), (4, 4, 4, 4), (4, 4, 8, 2), (3, 8, 3, 1), (3, 8, 6, 4), (3, 8, 3, 4), (3, 4, 6, 2),
     (8, 3, 12, 2)],
)  # fmt: skip
def test_groups_on_nodes_that_cut_them_unevenly(nodes: int, per_node: int, size: int, stride: int) -> None:
    hardware = PROFILE.model_copy(update={"nodes": nodes, "devices_per_node": per_node})
    least, share = placed(nodes * per_node, per_node, size, stride)
    found = estimator(hardware)
    found.groups["dp"] = found.groups["dp"]._replace(size=size, stride=stride)
    assert found.members(size, stride) == least
    assert found.outside_bytes(Message("dp", "all_gather", 600.0)) == pytest.approx(600 * share)


@pytest.mark.parametrize(
    ("group", "outside"), [("tp", 0), ("block", 4 / 7), ("dp", 6 / 7), ("dp_tp", 12 / 15), ("expert_dp", 1)]
)
def test_what_leaves_the_node_by_group(group: GroupName, outside: float) -> None:
    """Nodes of four; dp 8 x tp 2, blocks of 8 ranks, two copies of every expert."""
    found = estimator(work=replace(WORK, dp=8, tp=2, ep=8))
    assert found.outside_bytes(Message(group, "all_gather", 1.0)) == pytest.approx(outside)
    assert estimator(load_hardware("1x16-cpu"), found.work).outside_bytes(Message(group, "all_gather", 1.0)) == 0


def test_what_hides_behind_matmuls() -> None:
    """Chunks: the first is waited for, the others have as many parts of the matmuls, less one, to hide behind."""
    chunked = estimator(work=replace(WORK, tp=4, ep=4, overlap_chunks=4))
    message = Message("block", "all_to_all", 1e9, 1, True)
    travel = chunked.message(message)
    done = Pass((), 0.0, (message,))
    assert chunked.exposed(done, 0.0) == pytest.approx(travel)
    assert chunked.exposed(done, travel / 2) == pytest.approx(travel / 4 + travel / 2 * 3 / 4)
    assert chunked.exposed(done, travel) == chunked.exposed(done, 10 * travel) == pytest.approx(travel / 4)
    open_ = Pass((), 0.0, (message._replace(overlapped=False),))
    assert chunked.exposed(open_, 10 * travel) == pytest.approx(travel)


def test_units_are_estimated_once_a_kind() -> None:
    work = replace(WORK, dp=2, tp=2, ep=2)
    found = estimator(work=work)
    units = dict(zip(unit_names(MODEL), found.units(), strict=True))
    assert list(units) == list(unit_names(MODEL))
    assert units["layers.0.attention"] == units["layers.1.attention"]
    for name in ("embed", "layers.0.ffn", "layers.1.ffn", "head"):
        assert units[name] == found.unit(unit_cost(work, name)), name
    assert units["layers.0.ffn"] != units["layers.1.ffn"]
    assert units["head"].recompute == units["head"].forward > units["head"].backward


def measured(**changes: object) -> HardwareProfile:
    times = {"forward": 1.0, "backward": 2.0, "backward_input": 1.5, "backward_weight": 1.0, "recompute": 0.5}
    kinds = (MeasuredUnit(kind=kind, update=0.1, **times) for kind in ("attention", "experts"))
    model = MeasuredModel(
        fingerprint=layer_fingerprint(MODEL), precision="fp32", micro_batch_sequences=1, sequence_length=64,
        units=tuple(kinds),
    ).model_copy(update=changes)  # fmt: skip
    return PROFILE.model_copy(update={"measured": (model,)})


def test_measured_units_are_preferred_for_the_same_layers_and_micro_batch() -> None:
    plain = estimator().units()
    deeper = replace(WORK, model=replace(MODEL, num_layers=6))
    found = dict(zip(unit_names(deeper.model), Estimator(measured(), deeper).units(), strict=True))
    for name in ("layers.4.attention", "layers.5.ffn"):
        assert (found[name].forward, found[name].backward, found[name].update) == (1.0, 2.0, 0.1)
    assert found["layers.4.ffn"] == plain[2] and found["embed"] == plain[0]  # not measured
    for changed in (replace(WORK, micro_batch_sequences=2), replace(WORK, tp=2), replace(WORK, precision="fp64")):
        hardware = measured()
        if changed.precision == "fp64":
            rates = {"fp32": PROFILE.matmul["fp32"], "fp64": PROFILE.matmul["fp32"]}
            hardware = hardware.model_copy(update={"matmul": rates})
        assert max(unit.forward for unit in Estimator(hardware, changed).units()) < 0.1
    for other in ({"sequence_length": 32}, {"fingerprint": "another"}):
        assert estimator(measured(**other)).units() == plain


def test_stages_inside_a_node_and_across() -> None:
    inside = estimator(PROFILE.model_copy(update={"nodes": 1}), replace(WORK, dp=1, tp=2, ep=2))
    across = estimator(work=replace(WORK, dp=2, tp=2, ep=2))
    sent = 32 * 32 * 4
    assert inside.transfer() == pytest.approx(sent / 50e9 + 10e-6)
    assert across.transfer() == pytest.approx(sent / 5e9 + 20e-6)


def test_a_precision_that_the_profile_lacks() -> None:
    with pytest.raises(UserError, match=r'model.precision = "bf16": the hardware profile plain has no matmul.bf16, o'):
        estimator(work=replace(WORK, precision="bf16"))
