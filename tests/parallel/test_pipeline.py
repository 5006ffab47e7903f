"""Pipelines of every schedule and any placement of the units, against the same micro-batches in one process."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from moeforge.config.model import ModelConfig, MoEConfig
from moeforge.layout import Layout, Stage, build_layout, unit_names
from moeforge.model import DenseAttention, ForwardContext, RouterRecord, RoutingGroups, Transformer
from moeforge.parallel import Mesh, Watchdog
from moeforge.parallel.executor import Accumulation, Executor, MicroBatch
from moeforge.parallel.pipeline import make_executor, share_tied

RunRanks = Callable[..., list[Any]]
CPU = torch.device("cpu")
SEQUENCES, POSITIONS = 2, 5

DENSE = ModelConfig(
    vocab_size=13, hidden_size=8, num_layers=4, num_heads=2, num_kv_heads=1, head_dim=4, ffn_size=12,
    tie_embeddings=False, qkv_bias=True,
)  # fmt: skip
ROUTED = replace(
    DENSE, tie_embeddings=True, qk_norm="full", moe=MoEConfig(5, 2, 6, gate_norm=1.0, gate_norm_learned=True)
)
UNTIED = replace(ROUTED, tie_embeddings=False)
MIXED = replace(ROUTED, moe=MoEConfig(4, 2, 6, router_bias=True, layer_frequency=2))
UNITS = len(unit_names(DENSE))


@dataclass(frozen=True)
class Case:
    """`stages` in layers, or `units`: where each stage but the first begins."""

    config: ModelConfig
    pp: int
    stages: tuple[float, ...] | None = None
    units: tuple[int, ...] = ()
    schedule: str = "1f1b"
    recompute: str | tuple[int, ...] = "none"
    micro: int = 4
    aux_loss: str = "skywork"

    @property
    def layout(self) -> Layout:
        count = len(self.units) + 1 if self.units else len(self.stages or range(self.pp))
        options: dict[str, Any] = {"pp": self.pp, "chunks": count // self.pp, "schedule": self.schedule}
        options["recompute" if isinstance(self.recompute, str) else "recompute_layers"] = self.recompute
        if not self.units:
            return build_layout(self.config, stages=self.stages, **options)
        layout = build_layout(self.config, stages=(4.0,) + (0.0,) * (count - 1), **options)
        again = set().union(*(stage.recompute for stage in layout.stages))
        names, bounds = unit_names(self.config), (0, *self.units, UNITS)
        spans = zip(bounds, bounds[1:], strict=False)
        stages = (Stage(b, e, tuple(name for name in names[b:e] if name in again)) for b, e in spans)
        return replace(layout, stages=tuple(stages))


INTERLEAVED, ZERO_BUBBLE = "interleaved-1f1b", "zero-bubble"
CASES = {
    "two": Case(ROUTED, 2),
    "inside a layer": Case(ROUTED, 2, (1.5, 2.5), micro=5),
    "uneven": Case(UNTIED, 3, (0.5, 3, 0.5), recompute="all"),
    "an empty stage": Case(MIXED, 4, (2, 0, 1, 1), micro=6),
    "embedding and head alone": Case(ROUTED, 3, units=(1, 9)),
    "empty first stages": Case(ROUTED, 3, units=(0, 0), recompute="attention"),
    "empty last stages": Case(UNTIED, 3, units=(10, 10)),
    "one of four, tied": Case(ROUTED, 4, units=(0, 10, 10)),
    "dense": Case(DENSE, 2, (1, 3)),
    "switch loss": Case(UNTIED, 2, aux_loss="switch"),
    "loss of global load": Case(ROUTED, 2, aux_loss="global"),
    "interleaved": Case(ROUTED, 2, (1, 1, 1, 1), schedule=INTERLEAVED),
    "interleaved, recomputing some": Case(UNTIED, 2, (1.5, 0.5, 1, 1), (), INTERLEAVED, (1, 0, 1, 0), micro=6),
    "interleaved, three stages a rank, half empty": Case(MIXED, 2, units=(0, 3, 3, 10, 10), schedule=INTERLEAVED),
    "interleaved, three ranks": Case(DENSE, 3, (1, 0.5, 0, 1, 1, 0.5), schedule=INTERLEAVED, micro=8),
    "zero-bubble": Case(ROUTED, 2, schedule=ZERO_BUBBLE),
    "zero-bubble, loss of global load": Case(UNTIED, 2, schedule=ZERO_BUBBLE, aux_loss="global"),
    "zero-bubble, recomputing one stage": Case(MIXED, 3, (1, 2, 1), (), ZERO_BUBBLE, (0, 2, 0), micro=6),
    "zero-bubble, recomputing a part": Case(ROUTED, 2, (2, 2), (), ZERO_BUBBLE, "ffn"),
    "zero-bubble, four stages": Case(UNTIED, 2, (0.5, 1.5, 1.5, 0.5), schedule=ZERO_BUBBLE, micro=8),
    "zero-bubble, empty stages": Case(DENSE, 2, units=(0, 5, 10), schedule=ZERO_BUBBLE),
    "zero-bubble, embedding and head on one, tied": Case(ROUTED, 3, units=(0, 10), schedule=ZERO_BUBBLE),
    "zbv": Case(UNTIED, 2, (1, 1, 1, 1), schedule="zbv"),
    "zbv, tied on one rank": Case(ROUTED, 2, (0.5, 1, 2, 0.5), schedule="zbv", micro=7),
    "zbv, tied on two ranks": Case(ROUTED, 2, units=(3, 7, 10), schedule="zbv", micro=5),
    "zbv, recomputing the way down": Case(ROUTED, 2, (1, 1, 1, 1), (), "zbv", (1, 1, 0, 0), micro=6),
    "zbv, three ranks, empty stages": Case(MIXED, 3, units=(0, 3, 5, 5, 10), schedule="zbv", micro=6),
}  # fmt: skip


def whole_model(config: ModelConfig, dtype: torch.dtype) -> Transformer:
    model = Transformer(config)
    torch.manual_seed(0)
    model.reset_parameters(0.4)
    return model.to(dtype)


def batches_of(
    config: ModelConfig, count: int, positions: int | Sequence[int] = POSITIONS, seed: int = 1, aux_loss: Any = "none"
) -> tuple[list[MicroBatch], RouterRecord | None]:
    """Micro-batches with capacity dropping, padding and masked targets; and the record of what is routed."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [positions] * count if isinstance(positions, int) else positions
    record = None
    if config.moe is not None:
        layers = config.moe_layers
        alpha = torch.linspace(0.3, 0.9, len(layers), dtype=torch.float64)
        record = RouterRecord(layers, config.moe.num_experts, count, alpha, SEQUENCES * sum(lengths), aux_loss)
    batches = []
    for i, length in enumerate(lengths):
        tokens, targets = torch.randint(config.vocab_size, (2, SEQUENCES * length), generator=generator)
        valid = torch.rand(len(tokens), generator=generator) < 0.8
        context = ForwardContext(
            attention=DenseAttention(SEQUENCES, length),
            groups=RoutingGroups(SEQUENCES, valid, 1.0, drop=True),
            record=record,
            micro_batch=i,
        )
        place = torch.arange(length).repeat(SEQUENCES)
        batches.append(MicroBatch(tokens, place, targets.where(valid, -100), context, 0.25 / (SEQUENCES * length)))
    return batches, record


def gradients(model: Transformer) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@cache
def expected(config: ModelConfig, micro: int, aux_loss: str) -> tuple[Tensor, dict[str, Tensor], Tensor | None, Tensor]:
    """Loss, gradients, record and held-out loss of one process."""
    model = whole_model(config, torch.float64)
    executor = Accumulation([model], CPU)
    batches, record = batches_of(config, micro, aux_loss=aux_loss)
    loss = executor.train(batches)
    held_out = executor.evaluate(batches_of(config, 3, (4, 7, 2), seed=2)[0])
    return loss, gradients(model), None if record is None else record.values, held_out


def chunks_of(layout: Layout, config: ModelConfig, mesh: Mesh, dtype: torch.dtype = torch.float64) -> list[Transformer]:
    weights = whole_model(config, dtype).state_dict()
    chunks = []
    for stage in mesh.stages:
        chunk = Transformer(config, layout, stage).to(dtype)
        chunk.load_state_dict({name: weights[name] for name in chunk.state_dict()})
        chunks.append(chunk)
    share_tied(chunks)
    return chunks


def nothing() -> None:
    pass


def pipeline_of(case: Case, collect: Callable[[], None] = nothing) -> tuple[list[Transformer], Executor]:
    layout = case.layout
    layout.check(case.config, case.pp)
    mesh = Mesh.create(layout, CPU)
    chunks = chunks_of(layout, case.config, mesh)
    return chunks, make_executor(chunks, mesh, torch.float64, collect)


def total(results: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Copies of a tied embedding added up."""
    sums: dict[str, Tensor] = {}
    for result in results:
        for name, gradient in result.items():
            sums[name] = sums[name] + gradient if name in sums else gradient
    return sums


@pytest.mark.parametrize("name", CASES)
def test_loss_gradients_statistics_and_held_out_loss(name: str, run_ranks: RunRanks) -> None:
    case = CASES[name]

    def work(rank: int) -> tuple[Tensor, dict[str, Tensor], Tensor | None, Tensor, Counter[str]]:
        chunks, executor = pipeline_of(case)
        runs: Counter[str] = Counter()
        for chunk in chunks:
            for unit, module in chunk.units():
                module.register_forward_hook(lambda *_, of=unit: runs.update([of]))
        batches, record = batches_of(case.config, case.micro, aux_loss=case.aux_loss)
        loss = executor.train(batches)
        found: dict[str, Tensor] = {}
        for chunk in chunks:  # a tied embedding in two chunks of a rank is one parameter
            found |= gradients(chunk)
        once = runs.copy()
        held_out = executor.evaluate(batches_of(case.config, 3, (4, 7, 2), seed=2)[0])
        return loss, found, None if record is None else record.values, held_out, once

    loss, grads, record, held_out = expected(case.config, case.micro, case.aux_loss)
    results = run_ranks(case.pp, work)
    exact: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-13}
    torch.testing.assert_close(sum(result[0] for result in results), loss, **exact)
    torch.testing.assert_close(sum(result[3] for result in results), held_out, **exact)
    found = total([result[1] for result in results])
    assert found.keys() == grads.keys()
    for parameter, gradient in grads.items():
        torch.testing.assert_close(found[parameter], gradient, msg=f"gradient of {parameter}", **exact)
    if record is not None:
        torch.testing.assert_close(sum(result[2] for result in results), record, **exact)

    again = {unit for stage in case.layout.stages for unit in stage.recompute}
    assert sum((result[4] for result in results), Counter()) == {
        unit: case.micro * (1 + (unit in again)) for unit in unit_names(case.config)
    }


def test_several_chunks_on_one_rank_need_no_pipeline() -> None:
    layout = build_layout(ROUTED, chunks=3, schedule=INTERLEAVED, stages=(1.5, 0, 2.5))
    mesh = Mesh.single(layout, CPU)
    chunks = chunks_of(layout, ROUTED, mesh)
    executor = make_executor(chunks, mesh, torch.float64, nothing)
    assert isinstance(executor, Accumulation)
    loss = executor.train(batches_of(ROUTED, 4, aux_loss="skywork")[0])
    wanted_loss, wanted, _, _ = expected(ROUTED, 4, "skywork")
    torch.testing.assert_close(loss, wanted_loss)
    assert chunks[0].output_weight is chunks[2].output_weight
    found: dict[str, Tensor] = {}
    for chunk in chunks:
        found |= gradients(chunk)
    torch.testing.assert_close(found, wanted)


SPLITS = {
    "1f1b": Case(ROUTED, 2),
    INTERLEAVED: Case(ROUTED, 2, (1, 1, 1, 1), schedule=INTERLEAVED),
    ZERO_BUBBLE: Case(ROUTED, 2, (1, 1, 1, 1), (), ZERO_BUBBLE, (1, 0, 0, 1)),
    "zbv": Case(ROUTED, 2, (1, 1, 1, 1), (), "zbv", (0, 1, 0, 0)),
}


@pytest.mark.parametrize("schedule", SPLITS)
def test_16_bit_gradients_are_collected_after_every_micro_batch(schedule: str, run_ranks: RunRanks) -> None:
    """So that they add up in float32, and never in 16 bits."""
    case, kind = SPLITS[schedule], torch.bfloat16

    def collector(chunks: Sequence[Transformer]) -> tuple[Callable[[], None], dict[str, Tensor], Counter[str]]:
        parameters = {name: p for chunk in chunks for name, p in chunk.named_parameters()}
        sums = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in parameters.items()}
        times: Counter[str] = Counter()

        def collect() -> None:
            for name, parameter in parameters.items():
                if parameter.grad is not None:
                    sums[name] += parameter.grad
                    times[name] += 1
                    parameter.grad = None

        return collect, sums, times

    model = whole_model(case.config, kind)
    batches, _ = batches_of(case.config, case.micro, aux_loss="skywork")
    collect, wanted, _ = collector([model])
    wanted_loss = torch.zeros((), dtype=torch.float64)
    for batch in batches:
        wanted_loss += Accumulation([model], CPU).train([batch])
        collect()

    def work(rank: int) -> tuple[Tensor, dict[str, Tensor], Counter[str]]:
        layout = case.layout
        mesh = Mesh.create(layout, CPU)
        chunks = chunks_of(layout, case.config, mesh, kind)
        collect, sums, times = collector(chunks)
        loss = make_executor(chunks, mesh, kind, collect).train(batches_of(case.config, 4, aux_loss="skywork")[0])
        assert all(p.grad is None for chunk in chunks for p in chunk.parameters())
        return loss, sums, times

    results = run_ranks(2, work)
    torch.testing.assert_close(sum(result[0] for result in results), wanted_loss, rtol=1e-6, atol=0)
    found = total([result[1] for result in results])
    for name, gradient in wanted.items():
        # The tied embedding's two uses are rounded one by one, or together.
        tolerance = 2**-8 if name == "embed.weight" else 1e-6
        assert (found[name] - gradient).norm() <= tolerance * gradient.norm(), name
    for _, _, times in results:
        assert {name: n for name, n in times.items() if n % case.micro} == {}


def test_steps_of_other_sizes(run_ranks: RunRanks) -> None:
    """Numbers and lengths of micro-batches may change from step to step, and change back; gradients add up."""
    case = Case(ROUTED, 2, (1, 1, 1, 1), schedule="zbv")
    steps = ((4, 5), (6, 3), (4, 5), (4, 8))

    def work(rank: int) -> tuple[Tensor, dict[str, Tensor]]:
        chunks, executor = pipeline_of(case)
        loss = sum(executor.train(batches_of(case.config, *step)[0]) for step in steps)
        return torch.as_tensor(loss), gradients(chunks[0]) | gradients(chunks[1])

    model = whole_model(case.config, torch.float64)
    loss = sum(Accumulation([model], CPU).train(batches_of(case.config, *step)[0]) for step in steps)
    results = run_ranks(2, work)
    torch.testing.assert_close(sum(result[0] for result in results), loss)
    torch.testing.assert_close(total([result[1] for result in results]), gradients(model))


def test_micro_batches_of_unequal_sizes_are_refused_before_they_travel(run_ranks: RunRanks) -> None:
    def work(rank: int) -> None:
        _, executor = pipeline_of(Case(ROUTED, 2))
        executor.train(batches_of(ROUTED, 3, (5, 5, 4))[0])

    with pytest.raises(AssertionError, match="ValueError: micro-batch 2 has 8 tokens, the first one 10"):
        run_ranks(2, work)


def test_a_failing_stage_raises_what_failed(run_ranks: RunRanks) -> None:
    def work(rank: int) -> None:
        chunks, executor = pipeline_of(Case(ROUTED, 2))

        def fail(*_: Any) -> None:
            raise OverflowError("out of luck")

        if rank == 1:
            chunks[0].register_forward_hook(fail)
        executor.train(batches_of(ROUTED, 4)[0])

    with pytest.raises(AssertionError, match="rank 1:(.|\n)*OverflowError: out of luck"):
        run_ranks(2, work)


ALIVE = {
    "1f1b": [3, 2, 1],  # as many as stages from here to the end
    INTERLEAVED: [8, 6, 4],  # 2 (pp - rank - 1) + (chunks - 1) pp + 1
    ZERO_BUBBLE: [3, 3, 3],  # ZB-H1 has the largest of 1f1b everywhere
    "zbv": [6, 6, 6],  # of half the size
}


@pytest.mark.parametrize("schedule", SPLITS)
def test_activations_alive_at_once(schedule: str, run_ranks: RunRanks) -> None:
    """Forward passes of a rank's chunks whose backward is not complete, at most."""
    stages = None if schedule in ("1f1b", ZERO_BUBBLE) else (0.5, 1, 1, 0.5, 0.5, 0.5)
    case = Case(ROUTED, 3, stages, schedule=schedule, micro=12)

    def work(rank: int) -> int:
        alive, most = 0, 0

        def begun(*_: Any) -> None:
            nonlocal alive, most
            alive += 1
            most = max(most, alive)

        def done() -> None:
            nonlocal alive
            alive -= 1

        chunks, executor = pipeline_of(case, done)
        for chunk in chunks:
            chunk.register_forward_hook(begun)
        executor.train(batches_of(case.config, case.micro)[0])
        assert alive == 0
        return most

    assert run_ranks(3, work) == ALIVE[schedule]


class Notes(Watchdog):
    """Keeps what the main thread was seen doing."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def doing(self, operation: str) -> Any:
        self.seen.append(operation)
        return super().doing(operation)


def test_the_watchdog_sees_every_pass_of_a_stage(run_ranks: RunRanks) -> None:
    """A long step makes progress, and a rank that computes is told from those that wait for it."""

    def work(rank: int) -> Counter[str]:
        layout, notes = Case(ROUTED, 2, schedule=ZERO_BUBBLE).layout, Notes()
        mesh = Mesh.create(layout, CPU, watchdog=notes)
        make_executor(chunks_of(layout, ROUTED, mesh), mesh, torch.float64, nothing).train(batches_of(ROUTED, 4)[0])
        return Counter(notes.seen)

    for stage, seen in enumerate(run_ranks(2, work)):
        waiting = {"pipeline step over pp": 1}
        assert seen == waiting | {f"forward of stage {stage}": 4, f"backward of stage {stage}": 8}


def test_transfers_are_counted(run_ranks: RunRanks) -> None:
    def work(rank: int) -> dict[Any, int]:
        layout = Case(ROUTED, 2).layout
        mesh = Mesh.create(layout, CPU, local_world_size=1)
        executor = make_executor(chunks_of(layout, ROUTED, mesh), mesh, torch.float64, nothing)
        executor.train(batches_of(ROUTED, 4)[0])
        executor.evaluate(batches_of(ROUTED, 1)[0])
        return dict(mesh.traffic.sent)

    size = SEQUENCES * POSITIONS * ROUTED.hidden_size * 8
    route = ("pp", "send", "inter-node")
    assert run_ranks(2, work) == [{route: 5 * size}, {route: 4 * size}]
