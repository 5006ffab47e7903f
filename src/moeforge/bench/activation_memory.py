"""Peak activation memory of real passes against the planner's: `python -m moeforge.bench.activation_memory`.

torch's MemTracker counts every tensor that operations return, on any device; weights and the gradients that persist are
subtracted. Under it torch's engine does not add gradients in place, which costs one more sum than a run does.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.distributed._tools.mem_tracker import MemTracker

from moeforge.config.model import ModelConfig, MoEConfig
from moeforge.config.presets import model_preset
from moeforge.layout import Layout, build_layout, unit_names
from moeforge.model import DenseAttention, Dispatcher, ForwardContext, RouterRecord, RoutingGroups, Transformer
from moeforge.parallel import Mesh
from moeforge.parallel.dispatcher import make_dispatcher
from moeforge.parallel.executor import Executor, MicroBatch
from moeforge.parallel.parameters import ParameterPart, parameter_parts
from moeforge.parallel.pipeline import Pipeline, make_executor
from moeforge.parallel.shard import TensorParallelShard
from moeforge.plan.activations import unit_activations
from moeforge.plan.pieces import vocabulary_gradient_bytes
from moeforge.plan.stage_memory import StageActivations, stage_activations, stage_boundary
from moeforge.plan.workload import Workload
from moeforge.train.micro_batches import Lazy
from moeforge.train.optimizer import MODEL_DTYPE, Optimizer

_CPU = torch.device("cpu")


class _NoModules:
    """In place of MemTracker's look at modules, which is for a breakdown that we do not ask for, and bears neither a
    module that runs again before its backward nor autograd.grad."""

    is_bw = False
    parents: frozenset[str] = frozenset()

    def register_user_hooks(self, *hooks: Any) -> None:
        pass

    def clear_user_hooks(self) -> None:
        pass

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: Any) -> None:
        pass


@dataclass(frozen=True)
class Case:
    """A model and one micro-batch of it."""

    name: str
    model: ModelConfig
    precision: str
    sequences: int
    positions: int
    recompute: str | tuple[str, ...] = "none"

    @property
    def workload(self) -> Workload:
        """One process, two micro-batches."""
        return Workload(self.model, self.precision, self.positions, self.sequences, 2 * self.sequences)


def measured_bytes(
    layout: Layout, mesh: Mesh, model: ModelConfig, precision: str, sequences: int, positions: int, count: int = 2
) -> int:
    """Peak of this rank's activations and temporary tensors over the second of two steps of `count` micro-batches.

    By then gradients, receive buffers and schedules are there.
    """
    torch.manual_seed(0)
    dtype = MODEL_DTYPE[precision]
    chunks, parameters, parts = [], dict[str, torch.nn.Parameter](), dict[str, ParameterPart]()
    for stage in mesh.stages:
        chunk = Transformer(model, layout, stage, mesh.at.tp, mesh.at.expert_rank).to(dtype)
        chunk.reset_parameters()
        chunks.append(chunk)
        parameters |= dict(chunk.named_parameters())
        parts |= parameter_parts(model, layout, stage, mesh.at.tp, mesh.at.expert_rank)
    optimizer = Optimizer(parameters, parts, mesh, masters=precision == "bf16")
    executor: Executor = make_executor(chunks, mesh, dtype, optimizer.collect)
    dispatcher = make_dispatcher(mesh, model.moe.top_k if model.moe else 1)
    batches = Lazy(count, lambda i: _micro_batch(model, mesh, dispatcher, sequences, positions))
    executor.train(batches)
    tracker = MemTracker()
    vars(tracker)["_mod_tracker"] = _NoModules()
    sums = [mover.total for mover in optimizer._movers.values()]
    tracker.track_external(*chunks, *sums, *_receive_buffers(executor))
    before = tracker.get_tracker_snapshot()[_CPU]["Total"]
    with tracker:
        executor.train(batches)
    return int(tracker.get_tracker_snapshot("peak")[_CPU]["Total"] - before)


def _receive_buffers(executor: Executor) -> list[torch.Tensor]:
    """Those that a pipeline's stages keep (see `plan.stage_memory.stage_boundary`)."""
    schedules = executor._schedules.values() if isinstance(executor, Pipeline) else ()
    stages = [stage for made in schedules for stage in getattr(made, "_stages", None) or [made._stage]]
    by_micro_batch = [infos for stage in stages for infos in (stage.args_recv_info, stage.grad_recv_info)]
    found = (info.buffer for infos in by_micro_batch for each in infos.values() for info in each)
    return [buffer for buffer in found if buffer is not None]


def _micro_batch(model: ModelConfig, mesh: Mesh, dispatcher: Dispatcher, sequences: int, positions: int) -> MicroBatch:
    tokens_T = torch.randint(0, model.vocab_size, (sequences * positions,))
    positions_T = torch.arange(positions).repeat(sequences)
    groups = record = None
    if model.moe is not None:
        alpha = torch.full((len(model.moe_layers),), 0.01, dtype=torch.float64)
        record = RouterRecord(model.moe_layers, model.moe.num_experts, 1, alpha, len(tokens_T))
        groups = RoutingGroups(sequences, sequences=sequences)
    context = ForwardContext(
        DenseAttention(sequences, positions), dispatcher, TensorParallelShard(mesh, len(tokens_T)), groups, record
    )
    return MicroBatch(tokens_T, positions_T, tokens_T.roll(-1), context, 1 / len(tokens_T))


def predicted_stage(work: Workload, layout: Layout, stage: int) -> StageActivations:
    """What the planner says about one stage of a layout."""
    part, names = layout.stages[stage], unit_names(work.model)
    units = names[part.begin_unit : part.end_unit]
    tied = work.model.tie_embeddings and {"embed", "head"} <= set(units)
    here = [other in layout.stages_of(layout.pp_rank_of(stage)) for other in (stage - 1, stage + 1)]
    return stage_activations(
        [(unit_activations(work, unit), unit in part.recompute) for unit in units],
        stage_boundary(work, units, layout.schedule if layout.pp > 1 else None, *here),
        vocabulary_gradient_bytes(work) if tied else 0,
    )


def compare(case: Case) -> dict[str, Any]:
    """Measured and predicted bytes of a case in one process, and the prediction's relative error."""
    layout = build_layout(case.model, recompute=case.recompute)
    mesh = Mesh.single(layout, _CPU)
    measured = measured_bytes(layout, mesh, case.model, case.precision, case.sequences, case.positions)
    stage = predicted_stage(case.workload, layout, 0)
    predicted = stage.kept + max(stage.forward_transient, stage.backward_transient)
    return {
        "case": case.name,
        "measured_bytes": measured,
        "predicted_bytes": predicted,
        "error": predicted / measured - 1,
    }


def cases() -> list[Case]:
    """Models as wide as SmolLM2, with fewer layers and words so that activations are most of the memory."""
    dense = replace(model_preset("smollm2-135m"), num_layers=6, vocab_size=8192)
    moe = replace(dense, num_layers=4, moe=MoEConfig(num_experts=8, top_k=2, expert_size=768, gate_norm=1.0))
    untied = replace(dense, tie_embeddings=False)
    some = tuple(f"layers.{i}.{kind}" for i in range(3) for kind in ("attention", "ffn"))
    found = [
        Case("dense bf16", dense, "bf16", 1, 1024),
        Case("dense bf16, pure", dense, "bf16_pure", 1, 1024),
        Case("dense fp32", dense, "fp32", 1, 1024),
        Case("dense fp64", dense, "fp64", 1, 512),
        Case("dense bf16, untied", untied, "bf16", 2, 1024),
        Case("dense fp32, untied", untied, "fp32", 2, 512),
        Case("dense bf16, all words", replace(dense, vocab_size=49152), "bf16", 2, 1024),
        Case("multi-head attention fp32", replace(dense, num_kv_heads=9), "fp32", 1, 1024),
        Case("multi-query attention bf16", replace(dense, num_kv_heads=1), "bf16", 1, 1024),
        Case("norms of heads bf16", replace(dense, qk_norm="head"), "bf16", 1, 1024),
        Case("norms of heads fp32", replace(dense, qk_norm="full"), "fp32", 1, 1024),
        Case("biases bf16", replace(dense, qkv_bias=True, output_bias=True), "bf16", 1, 1024),
        Case("window bf16", replace(dense, sliding_window=256), "bf16", 1, 1024),
        Case("experts bf16", moe, "bf16", 2, 512),
        Case("experts fp32", moe, "fp32", 1, 1024),
        Case("experts fp64", moe, "fp64", 1, 512),
        Case("experts bf16, softmax gate", replace(moe, moe=MoEConfig(4, 2, 1536)), "bf16", 1, 2048),
        Case("experts every second layer fp32", replace(moe, moe=MoEConfig(8, 1, 768, 1.0, renormalize=False,
             layer_frequency=2)), "fp32", 1, 1024),
    ]  # fmt: skip
    for name, model in (("dense", untied), ("experts", moe)):
        for precision in ("bf16", "fp32"):
            for recompute in ("all", "attention", "ffn", some):
                label = recompute if isinstance(recompute, str) else "three layers"
                found.append(Case(f"{name} {precision}, recompute {label}", model, precision, 1, 1024, recompute))
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps([compare(case) for case in cases()], indent=1))
