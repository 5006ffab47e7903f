"""Plans: what is simulated is the layout that is written, memory holds, and the uniform plan is as defined."""

from __future__ import annotations

from dataclasses import replace

import pytest

from moeforge.config.clusters import load_hardware
from moeforge.config.model import ModelConfig, MoEConfig
from moeforge.config.presets import model_preset
from moeforge.layout import Layout, build_layout, unit_names
from moeforge.plan.arrangement import Arrangement
from moeforge.plan.planner import evaluate, make_plan, rank_peak_bytes, uniform_plan, unit_times
from moeforge.plan.search import work_of
from moeforge.plan.simulator import simulate
from moeforge.plan.static_memory import static_bytes
from moeforge.plan.workload import Workload

SKYWORK = model_preset("skywork-moe")
CLUSTER = load_hardware("192x8-a800")
PRODUCTION = Arrangement(12, 32, 4, 4, 1, "1f1b", 1, 1)


def work(arrangement: Arrangement, length: int = 8192, batch: int = 1536, model: ModelConfig = SKYWORK) -> Workload:
    return work_of(Workload(model, "bf16", length, 1, batch), arrangement)


@pytest.mark.parametrize(
    "arrangement",
    [
        PRODUCTION,
        replace(PRODUCTION, micro_batch_sequences=2),
        replace(PRODUCTION, schedule="interleaved-1f1b", chunks=2),
        replace(PRODUCTION, schedule="zbv", chunks=2),
        replace(PRODUCTION, schedule="zero-bubble"),
        Arrangement(24, 16, 4, 16, 1, "1f1b", 1, 1),
    ],
    ids=lambda a: f"{a.schedule}, {a.micro_batch_sequences}, pp {a.pp}",
)
def test_a_plan_fits_covers_the_model_and_takes_what_it_says(arrangement: Arrangement) -> None:
    own = work(arrangement)
    plan = make_plan(CLUSTER, own, arrangement)
    assert plan is not None and plan.fits
    plan.layout.check(SKYWORK, CLUSTER.devices)
    assert Layout.from_json(plan.layout.to_json()) == plan.layout
    assert plan.layout.micro_batch_sequences == arrangement.micro_batch_sequences
    # Summed up from the units again.
    times = dict(zip(unit_names(SKYWORK), unit_times(CLUSTER, own), strict=True))
    for stage, time in zip(plan.layout.stages, plan.stages, strict=True):
        names = unit_names(SKYWORK)[stage.begin_unit : stage.end_unit]
        assert time.forward == pytest.approx(sum(times[name].forward for name in names))
        again = sum(times[name].recompute for name in stage.recompute)
        assert time.backward == pytest.approx(sum(times[name].backward for name in names) + again)
    tokens = own.batch_sequences * own.sequence_length
    assert plan.tokens_per_second_per_gpu == pytest.approx(tokens / plan.step_seconds / 1536)
    uniform = uniform_plan(CLUSTER, own, arrangement)
    assert uniform.step_seconds >= plan.step_seconds
    assert plan.lower_bound <= plan.step_seconds


def test_the_production_pipeline_is_proven_and_beats_uniform_stages() -> None:
    plan = make_plan(CLUSTER, work(PRODUCTION), PRODUCTION)
    whole = make_plan(CLUSTER, work(PRODUCTION), PRODUCTION, whole_layers=True)
    uniform = uniform_plan(CLUSTER, work(PRODUCTION), PRODUCTION)
    assert plan is not None and whole is not None
    assert plan.gap < 1e-9 and whole.gap < 1e-9
    assert plan.step_seconds < whole.step_seconds <= uniform.step_seconds
    assert all((stage.begin_unit % 2 == 1) for stage in whole.layout.stages[1:])


def test_the_uniform_plan_is_as_even_as_layers_allow_with_the_smallest_count_that_fits() -> None:
    arrangement = replace(PRODUCTION, micro_batch_sequences=2)
    own = work(arrangement)
    uniform = uniform_plan(CLUSTER, own, arrangement)
    layers = [(stage.end_unit - stage.begin_unit) / 2 for stage in uniform.layout.stages]
    assert layers == [5.5, 5, 5, 5, 4, 4, 4, 4, 4, 4, 4, 4.5]  # embedding and head are half a layer's units
    counts = {len(stage.recompute) // 2 for stage in uniform.layout.stages}
    assert len(counts) == 1 and uniform.fits
    (count,) = counts
    assert count > 0
    less = build_layout(SKYWORK, pp=12, dp=32, tp=4, recompute_layers=[count - 1] * 12)
    assert max(rank_peak_bytes(own, less, rank) for rank in range(12)) > CLUSTER.usable_bytes


def test_the_uniform_plan_exists_even_where_it_does_not_fit() -> None:
    small = CLUSTER.model_copy(update={"memory_gbytes": 20.0})
    uniform = uniform_plan(small, work(PRODUCTION), PRODUCTION)
    assert not uniform.fits and uniform.step_seconds > 0
    assert all(len(stage.recompute) >= 8 for stage in uniform.layout.stages)
    assert make_plan(small, work(PRODUCTION), PRODUCTION) is None


def test_less_memory_recomputes_more_and_is_slower() -> None:
    arrangement = replace(PRODUCTION, micro_batch_sequences=2)
    own = work(arrangement)
    steps, again = [], []
    for gbytes in (85.9, 75.0, 65.0):
        plan = make_plan(CLUSTER.model_copy(update={"memory_gbytes": gbytes}), own, arrangement)
        assert plan is not None and max(plan.peaks) <= gbytes * 1e9 * 0.92
        steps.append(plan.step_seconds)
        again.append(sum(len(stage.recompute) for stage in plan.layout.stages))
    assert steps == sorted(steps) and again == sorted(again) and again[0] < again[-1]


def test_a_tied_embedding_is_counted_on_both_ranks_that_hold_it() -> None:
    model = replace(model_preset("smollm2-135m"), num_layers=4, moe=MoEConfig(4, 2, 1536))
    arrangement = Arrangement(2, 1, 1, 1, 1, "1f1b", 1, 1)
    own = work(arrangement, 256, 8, model)
    table = model.vocab_size * model.hidden_size * 18
    names = unit_names(model)
    assert static_bytes(own, names[5:]) - static_bytes(own, names[5:-1]) > table
    cpu = load_hardware("1x2-cpu")
    plan = evaluate(cpu, own, arrangement, build_layout(model, pp=2))
    times = unit_times(cpu, own)
    plain = simulate("1f1b", 2, 8, plan.stages).update_seconds
    # The head's rank updates its copy, and waits for the sum of both gradients.
    assert plain > sum(t.update for t in times[5:]) + times[0].update
    single = evaluate(cpu, own, replace(arrangement, pp=1), build_layout(model))
    assert single.simulation.update_seconds == pytest.approx(sum(t.update for t in times))


def test_the_first_stage_of_a_split_backward_does_everything_at_once() -> None:
    arrangement = replace(PRODUCTION, schedule="zero-bubble")
    plan = make_plan(CLUSTER, work(arrangement), arrangement)
    assert plan is not None
    first, again = plan.stages[0], bool(plan.layout.stages[0].recompute)
    # Recomputed, all of it comes with the input's turn; else, with no input to find a gradient for, with the weights'.
    expected = (first.backward, 0.0) if again else (0.0, first.backward)
    assert (first.backward_input, first.backward_weight) == expected
