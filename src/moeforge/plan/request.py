"""From a training file, or a model alone, to what the planner is asked."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from moeforge.config.hardware import HardwareProfile
from moeforge.config.model import ModelConfig
from moeforge.config.parallel import ParallelSection
from moeforge.config.schema import TrainConfig, TrainSection
from moeforge.layout import Layout
from moeforge.plan.arrangement import Arrangement
from moeforge.plan.workload import Workload

_BATCH_TOKENS = 2**22
_KEYS = ("pp", "dp", "tp", "ep", "etp", "expert_mode", "schedule", "chunks")


@dataclass(frozen=True)
class Request:
    """`fixed`: what of an `Arrangement` (or `expert_mode`) the training file decides."""

    work: Workload
    fixed: dict[str, Any]


def request_of(run: TrainConfig, model: ModelConfig, said: Collection[str] = ()) -> Request:
    """What a training file decides: of [parallel] and the micro-batch every value that is not the default, which
    `train --init` writes down too; and whatever the command line has `said` (dotted keys)."""
    default = ParallelSection()
    fixed = {
        key: getattr(run.parallel, key)
        for key in _KEYS
        if f"parallel.{key}" in said or getattr(run.parallel, key) != getattr(default, key)
    }
    fixed = {key: value for key, value in fixed.items() if value != 0}
    micro = run.train.micro_batch_sequences
    if "train.micro_batch_sequences" in said or micro != TrainSection().micro_batch_sequences:
        fixed["micro_batch_sequences"] = micro
    return Request(workload_of(run, model), fixed)


def workload_of(run: TrainConfig, model: ModelConfig) -> Workload:
    """The step of a training file, on one process."""
    return Workload(
        model=model,
        precision=run.model.precision,
        expert_precision=run.model.expert_precision,
        sequence_length=run.data.sequence_length,
        micro_batch_sequences=run.train.micro_batch_sequences,
        batch_sequences=run.train.batch_sequences,
        optimizer=run.optimizer.kind,
        zero=run.parallel.zero,
        dispatcher=run.parallel.dispatcher,
        overlap_chunks=run.parallel.overlap_chunks,
        group_sequences=run.router.group_sequences,
    )


def arrangement_of(layout: Layout, micro_batch_sequences: int) -> Arrangement:
    """The arrangement that a layout has."""
    sizes = {key: getattr(layout, key) for key in ("pp", "dp", "tp", "ep", "etp", "schedule", "chunks")}
    return Arrangement(**sizes, micro_batch_sequences=micro_batch_sequences)


def default_batch(sequence_length: int, hardware: HardwareProfile) -> int:
    """Sequences of a step where nobody says: about 4 million tokens, or 8,192 for every device, in whole eighths a
    device where there are many, so that any number of replicas divides them and micro-batches can be chosen."""
    tokens = max(_BATCH_TOKENS, 8192 * hardware.devices)
    each = -(-tokens // (sequence_length * hardware.devices))
    return (each if each < 16 else -(-each // 8) * 8) * hardware.devices
