"""The layout that a training file asks for, on a given number of processes."""

from __future__ import annotations

from moeforge.config.model import ModelConfig
from moeforge.config.schema import TrainConfig
from moeforge.errors import UserError
from moeforge.layout import Layout, build_layout, require_schedule


def layout_for(config: TrainConfig, model: ModelConfig, world_size: int) -> Layout:
    """Raises UserError naming the key of [parallel] that does not fit the model, the batch or `world_size`."""
    section = config.parallel
    given = section.pp * section.tp
    if world_size % given or (section.dp and section.dp * given != world_size):
        wanted = f"pp x tp = {section.pp} x {section.tp}"
        if section.dp:
            wanted = f"pp x dp x tp = {section.pp} x {section.dp} x {section.tp}"
        raise UserError(
            f"parallel.{wanted}: {'must be' if section.dp else 'must divide'} the number of processes, {world_size}"
        )
    dp = world_size // given
    ep, etp = {
        "edp": (section.tp, 1),
        "ep": (dp * section.tp, 1),
        "etp": (dp, section.tp),
        "custom": (section.ep, section.etp),
    }[section.expert_mode]
    if model.moe is None:
        ep, etp = 1, 1
    elif ep > model.moe.num_experts:
        raise UserError(
            f'parallel.expert_mode = "{section.expert_mode}": spreads experts over {ep} ranks, but the model has only '
            f"{model.moe.num_experts}"
        )
    layout = build_layout(
        model,
        pp=section.pp,
        dp=dp,
        tp=section.tp,
        ep=ep,
        etp=etp,
        weights=section.tp_weights or None,
        stages=section.stages or None,
        schedule=section.schedule,
        chunks=section.chunks,
        recompute=config.model.recompute,
        recompute_layers=section.recompute_layers,
    )
    check_batch(config, layout)
    return layout


def check_batch(config: TrainConfig, layout: Layout) -> None:
    """Raises UserError unless a step's sequences make whole micro-batches that the schedule can run."""
    batch, micro = config.train.batch_sequences, config.train.micro_batch_sequences
    if batch % (micro * layout.dp):
        raise UserError(
            f"train.batch_sequences = {batch}: must be a multiple of train.micro_batch_sequences x dp = "
            f"{micro} x {layout.dp}"
        )
    require_schedule(layout.schedule, len(layout.stages), layout.pp, batch // (micro * layout.dp))
