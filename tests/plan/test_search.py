"""The search over arrangements: legal ones only, fixed keys kept, the best of all where everything can be tried."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

from moeforge.config.clusters import load_hardware
from moeforge.config.model import MoEConfig
from moeforge.config.presets import model_preset
from moeforge.errors import UserError
from moeforge.layout import require_schedule
from moeforge.plan.advice import advise, least_bytes
from moeforge.plan.arrangement import arrangements, expert_modes
from moeforge.plan.planner import make_plan
from moeforge.plan.search import candidates, ideal_seconds, search, work_of
from moeforge.plan.workload import Workload

SMALL = replace(model_preset("smollm2-135m"), num_layers=6, moe=MoEConfig(8, 2, 1536))
NODE = load_hardware("1x8-4090")


def test_arrangements_are_legal_and_all_there() -> None:
    found = list(arrangements(SMALL, NODE, 16, {}))
    assert len(found) == len(set(found)) > 100
    for a in found:
        assert a.pp * a.dp * a.tp == 8 and 16 % (a.dp * a.micro_batch_sequences) == 0
        assert a.ep <= 8 and (a.dp * a.tp) % (a.ep * a.etp) == 0
        require_schedule(a.schedule, a.pp * a.chunks, a.pp, 16 // (a.dp * a.micro_batch_sequences))
    assert {a.pp for a in found} == {1, 2, 4} and {a.tp for a in found} == {1, 2, 4, 8}
    assert {"edp", "ep", "etp", "custom"} == {a.expert_mode for a in found}
    assert {a.schedule for a in found} == {"1f1b", "interleaved-1f1b", "zero-bubble", "zbv"}


def test_fixed_keys_are_kept() -> None:
    fixed = {"pp": 2, "expert_mode": "ep", "schedule": "zbv", "micro_batch_sequences": 1}
    found = list(arrangements(SMALL, NODE, 16, fixed))
    assert found and all(a.pp == 2 and a.schedule == "zbv" and a.chunks == 2 for a in found)
    assert all((a.ep, a.etp) == (a.dp * a.tp, 1) and a.micro_batch_sequences == 1 for a in found)
    assert not list(arrangements(SMALL, NODE, 16, {"pp": 3}))
    assert not list(arrangements(SMALL, NODE, 7, {"dp": 2}))


def test_micro_batches_are_whole_routing_groups() -> None:
    micros = {a.micro_batch_sequences for a in arrangements(SMALL, NODE, 24, {"pp": 1, "tp": 4, "dp": 2}, group=3)}
    assert micros == {3, 6, 12}


def test_expert_modes_need_experts_enough() -> None:
    skywork = model_preset("skywork-moe")
    assert (128, 1) not in expert_modes(skywork, 32, 4) and (32, 4) not in expert_modes(skywork, 32, 4)
    assert (4, 1) in expert_modes(skywork, 32, 4) and (16, 1) in expert_modes(skywork, 4, 4)
    assert expert_modes(replace(skywork, moe=None), 4, 2) == [(1, 1)]


def test_the_best_of_all_arrangements_under_1f1b() -> None:
    work = Workload(SMALL, "bf16", 1024, 1, 16)
    fixed = {"schedule": "1f1b"}
    found = search(NODE, work, fixed, whole_layers=True)
    plans = [make_plan(NODE, own, a, whole_layers=True) for a, own in candidates(NODE, work, fixed)]
    assert found.best is not None
    assert found.best.step_seconds == min(plan.step_seconds for plan in plans if plan is not None)
    assert found.considered == len(plans) and found.planned < len(plans)
    assert all(other.step_seconds >= found.best.step_seconds for other in found.others)


def test_the_ideal_is_close_below_the_plan() -> None:
    work = Workload(SMALL, "bf16", 1024, 1, 16)
    for a, own in candidates(NODE, work, {"schedule": "1f1b", "tp": 2}):
        plan = make_plan(NODE, own, a)
        ideal = ideal_seconds(NODE, own, a)
        assert plan is not None and ideal is not None
        assert 0.95 * ideal <= plan.step_seconds <= 1.6 * ideal


@pytest.mark.slow
def test_a_search_of_1536_devices_takes_less_than_a_minute() -> None:
    work = Workload(model_preset("skywork-moe"), "bf16", 8192, 1, 1536)
    began = time.process_time()
    found = search(load_hardware("192x8-a800"), work, {})
    assert time.process_time() - began < 60
    assert found.best is not None and found.best.fits and found.considered > 1000


class TestAdvice:
    skywork = model_preset("skywork-moe")

    @pytest.mark.parametrize(("layers", "nodes"), [(13, 1), pytest.param(52, 4, marks=pytest.mark.slow)])
    def test_more_memory_or_nodes(self, layers: int, nodes: int) -> None:
        cluster = load_hardware(f"{nodes}x8-4090")
        work = Workload(replace(self.skywork, num_layers=layers), "bf16", 8192, 1, 128 * nodes)
        assert search(cluster, work, {}).best is None
        text = advise(cluster, work, {})
        assert f"no plan fits: {nodes}x8-4090 has 23.4 GB to use a device" in text
        few, nodes = nodes, int(text.split(f" nodes (are {nodes})")[0].rpartition(" ")[2])
        assert nodes > few
        assert search(load_hardware(f"{nodes}x8-4090"), work, {}, whole_layers=True).best is not None

    def test_the_nearest_value_of_a_fixed_key(self) -> None:
        cluster = load_hardware("16x8-a800")
        work = Workload(self.skywork, "bf16", 8192, 1, 512)
        fixed = {"pp": 1, "tp": 8, "expert_mode": "edp"}
        assert search(cluster, work, fixed).best is None
        text = advise(cluster, work, fixed)
        pp = int(text.split("parallel.pp = ")[1].split(" ")[0])
        assert search(cluster, work, fixed | {"pp": pp}, whole_layers=True).best is not None
        assert search(cluster, work, fixed | {"pp": pp // 2}, whole_layers=True).best is None

    def test_the_memory_that_is_named_suffices_and_less_does_not(self) -> None:
        cluster, fixed = load_hardware("8x8-h100"), {"pp": 8, "tp": 8, "schedule": "1f1b", "expert_mode": "edp"}
        work = Workload(self.skywork, "bf16", 8192, 1, 64)
        arrangement, own = next(iter(candidates(cluster, work, fixed)))
        need = least_bytes(cluster, own, arrangement)
        enough = cluster.model_copy(update={"memory_gbytes": need * 1.0001 / 1e9, "usable_memory": 1.0})
        less = cluster.model_copy(update={"memory_gbytes": need * 0.9999 / 1e9, "usable_memory": 1.0})
        assert make_plan(enough, own, arrangement, True) is not None
        assert make_plan(less, own, arrangement, True) is None

    def test_a_batch_that_nothing_divides(self) -> None:
        text = advise(load_hardware("8x8-h100"), Workload(self.skywork, "bf16", 8192, 1, 1), {"pp": 3})
        assert text.startswith("parallel.pp = 3: no pp x dp x tp of the 64 devices of 8x8-h100 with it")


def test_work_of_an_arrangement() -> None:
    a = next(iter(arrangements(SMALL, NODE, 16, {"pp": 2, "tp": 2, "expert_mode": "edp"})))
    own = work_of(Workload(SMALL, "bf16", 128, 4, 16), a)
    assert (own.dp, own.tp, own.ep, own.etp) == (2, 2, 2, 1)
    assert own.micro_batches == 16 // 2 // a.micro_batch_sequences


def test_unknown_precision_of_a_profile() -> None:
    with pytest.raises(UserError, match="has no matmul.fp64"):
        search(NODE, Workload(SMALL, "fp64", 128, 1, 8), {})
