"""From a training file, or a model alone, to what the planner is asked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moeforge.config.hardware import HardwareProfile
from moeforge.config.model import ModelConfig
from moeforge.config.schema import TrainConfig
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


def request_of(run: TrainConfig, model: ModelConfig) -> Request:
    """What a training file leaves open: every key of [parallel], and the micro-batch, that it does not name."""
    section, train = run.parallel, run.train
    named = section.model_fields_set
    fixed = {key: getattr(section, key) for key in _KEYS if key in named and getattr(section, key) != 0}
    if "micro_batch_sequences" in train.model_fields_set:
        fixed["micro_batch_sequences"] = train.micro_batch_sequences
    return Request(workload_of(run, model), fixed)


def workload_of(run: TrainConfig, model: ModelConfig) -> Workload:
    """The step of a training file, on one process."""
    return Workload(
        model=model,
        precision=run.model.precision,
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
    """Sequences of a step where nobody says: about 4 million tokens, or 8,192 for every device, so that any number of
    replicas divides them."""
    tokens = max(_BATCH_TOKENS, 8192 * hardware.devices)
    return -(-tokens // (sequence_length * hardware.devices)) * hardware.devices
