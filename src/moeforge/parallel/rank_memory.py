"""What every rank of a layout keeps through a run, exactly: its parts, and the optimizer state of those it owns."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from moeforge.config.model import ModelConfig
from moeforge.layout import Layout
from moeforge.parallel.parameters import ParameterPart, chunk_of, parameter_parts
from moeforge.plan.memory import BytesPerParameter


def rank_memory(model: ModelConfig, layout: Layout, each: BytesPerParameter, zero: bool) -> list[dict[str, Any]]:
    """A row for every rank: its coordinates, parameters, and bytes of weights, gradients and optimizer state (with
    ZeRO of its share alone)."""

    @functools.cache
    def parts(pp: int, tp: int, expert_rank: int) -> tuple[ParameterPart, ...]:
        own: dict[str, ParameterPart] = {}  # by name: chunks of one rank share a tied embedding
        for stage in layout.stages_of(pp):
            own |= parameter_parts(model, layout, stage, tp, expert_rank)
        return tuple(own.values())

    rows = []
    for rank in range(layout.world_size):
        at = layout.coordinates(rank)
        copies = {
            "dp": (layout.dp, at.dp),
            "dp_tp": (layout.dp * layout.tp, at.dp * layout.tp + at.tp),
            "expert_dp": (layout.expert_dp, at.expert_dp),
        }
        params = owned = 0
        for part in parts(at.pp, at.tp, at.expert_rank):
            begin, end = chunk_of(part.numel, *copies[part.reduce]) if zero else (0, part.numel)
            params += part.numel
            owned += end - begin
        sizes = {
            "weight_bytes": params * each.weights,
            "gradient_bytes": params * each.gradients,
            "optimizer_bytes": owned * each.optimizer,
        }
        rows.append(
            {"rank": rank, **dataclasses.asdict(at), "params": params, **sizes, "total_bytes": sum(sizes.values())}
        )
    return rows
