"""The [parallel] section, and the layout that it asks for on a given number of processes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from moeforge.config.model import ModelConfig
from moeforge.config.section import Count, CountOrZero, NonNegative, Positive, Section, refuse
from moeforge.errors import UserError
from moeforge.layout import Layout, build_layout, require_schedule

if TYPE_CHECKING:
    from moeforge.config.schema import TrainConfig


class ParallelSection(Section):
    """How the processes that torchrun starts share the work: pp x dp x tp must be their number. Nothing need divide
    evenly: heads, columns, experts and vocabulary rows are dealt out as they come."""

    pp: Count = Field(default=1, description="Pipeline ranks: how many the layers are dealt out to.")
    dp: CountOrZero = Field(
        default=0, description="Replicas that read different sequences; 0 = as many as pp x tp leaves room for."
    )
    tp: Count = Field(default=1, description="Ranks that share every layer (tensor and sequence parallel).")
    expert_mode: Literal["edp", "ep", "etp", "custom"] = Field(
        default="edp",
        description="Where experts live: edp = whole experts spread over the tp ranks; ep = whole experts over all "
        "dp x tp ranks of a stage; etp = experts over the dp ranks, each cut into column slices for the tp ranks; "
        "custom = as parallel.ep and parallel.etp say.",
    )
    ep: CountOrZero = Field(
        default=0, description='Ranks that experts are spread over, with expert_mode = "custom" (0 = not given).'
    )
    etp: CountOrZero = Field(
        default=0,
        description='Column slices of an expert, with expert_mode = "custom" (0 = not given); ep x etp divides '
        "dp x tp.",
    )
    tp_weights: tuple[NonNegative, ...] = Field(
        default=(), description="Share of the work of each tp rank, relative, for unequal GPUs; empty = equal."
    )
    schedule: Literal["1f1b", "interleaved-1f1b", "zero-bubble", "zbv"] = Field(
        default="1f1b",
        description="Order of forward and backward passes in the pipeline; the zero-bubble ones (zero-bubble = ZB-H1, "
        "zbv = ZB-V) split the backward pass, and fill the bubble with its weight gradients.",
    )
    chunks: Count = Field(
        default=1,
        description="Stages of each pipeline rank: 1 for 1f1b, 2 for zbv, 2 or more for interleaved-1f1b, any number "
        "for zero-bubble.",
    )
    stages: tuple[NonNegative, ...] = Field(
        default=(),
        description="Layers of each of the pp x chunks stages, in multiples of 0.5 (half a layer is its attention or "
        "its feed-forward), 0 allowed; empty = as even as whole layers allow. The embedding comes with the first "
        "stage, the head with the last.",
    )
    recompute_layers: tuple[CountOrZero, ...] = Field(
        default=(),
        description="Of each stage, the number of layers, from its first, whose activations are recomputed in the "
        "backward pass; empty = as model.recompute says.",
    )
    zero: bool = Field(
        default=True, description="ZeRO-1: divide the optimizer state over the ranks that hold the same weights."
    )
    dispatcher: Literal["auto", "alltoall", "allgather"] = Field(
        default="auto",
        description="How tokens reach experts: alltoall = each to the ranks of its experts; allgather = all to all "
        "ranks that share the experts, for small cases; auto = the one that sends less.",
    )
    overlap_chunks: Count = Field(
        default=1,
        description="Pieces that a micro-batch's tokens travel to their experts in, one while another is computed; "
        "1 = no overlap.",
    )
    hang_timeout_seconds: Positive = Field(
        default=600.0, description="After so long without progress a run names the rank it waits for, and ends."
    )

    @model_validator(mode="after")
    def _check(self) -> ParallelSection:
        custom = self.expert_mode == "custom"
        for key in ("ep", "etp"):
            value = getattr(self, key)
            if custom and value == 0:
                raise refuse(key, value, 'must be at least 1 with expert_mode = "custom"')
            if not custom and value:
                raise refuse(key, value, f'must be absent with expert_mode = "{self.expert_mode}", which decides it')
        if self.tp_weights and len(self.tp_weights) != self.tp:
            raise refuse(
                "tp_weights", list(self.tp_weights), f"must have one number for each of the {self.tp} tp ranks"
            )
        if self.tp_weights and not any(self.tp_weights):
            raise refuse("tp_weights", list(self.tp_weights), "must not all be 0")
        if self.dispatcher == "allgather" and self.overlap_chunks > 1:
            raise refuse("overlap_chunks", self.overlap_chunks, 'must be 1 with dispatcher = "allgather"')
        return self


def layout_for(config: TrainConfig, model: ModelConfig, world_size: int) -> Layout:
    """What [parallel] asks for, on `world_size` processes.

    Raises UserError naming the key that does not fit the model, the batch or `world_size`.
    """
    section = config.parallel
    dp = section.dp or max(1, world_size // (section.pp * section.tp))
    if section.pp * dp * section.tp != world_size:
        keys = ("pp", "dp", "tp") if section.dp else ("pp", "tp")
        given = ", ".join(f"parallel.{key} = {getattr(section, key)}" for key in keys)
        fit = "be" if section.dp else "divide"
        raise UserError(f"{given}: {' x '.join(keys)} must {fit} the number of processes ({world_size})")
    ep, etp = _expert_sizes(section, model, dp)
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
        recompute_layers=section.recompute_layers or None,
    )
    check_batch(config, layout)
    return layout


def _expert_sizes(section: ParallelSection, model: ModelConfig, dp: int) -> tuple[int, int]:
    """ep and etp; a dense model has no experts to spread."""
    if model.moe is None:
        return 1, 1
    mode, tp, experts = section.expert_mode, section.tp, model.moe.num_experts
    ep, etp, product = {
        "edp": (tp, 1, "tp"),
        "ep": (dp * tp, 1, "dp x tp"),
        "etp": (dp, tp, "dp"),
        "custom": (section.ep, section.etp, "parallel.ep"),
    }[mode]
    if ep > experts:
        raise UserError(
            f'parallel.expert_mode = "{mode}": spreads experts over {product} = {ep} ranks, must be at most the '
            f"model's number of experts ({experts})"
        )
    return ep, etp


def with_planned_micro_batches(config: TrainConfig, layout: Layout) -> TrainConfig:
    """The configuration with the micro-batches that a plan was made for.

    Raises UserError where the training file itself asks for others.
    """
    planned, train = layout.micro_batch_sequences, config.train
    if planned is None or planned == train.micro_batch_sequences:
        return config
    default = type(train).model_fields["micro_batch_sequences"].default
    if train.micro_batch_sequences != default:  # the default, which `train --init` writes down, is no decision
        raise UserError(
            f"train.micro_batch_sequences = {train.micro_batch_sequences}: the plan was made for {planned}; plan "
            "again, or leave the key out"
        )
    if planned % config.router.group_sequences:
        raise UserError(
            f"router.group_sequences = {config.router.group_sequences}: must divide the plan's micro-batches of "
            f"{planned} sequences; plan again"
        )
    return config.model_copy(update={"train": train.model_copy(update={"micro_batch_sequences": planned})})


def check_batch(config: TrainConfig, layout: Layout) -> None:
    """Raises UserError unless a step's sequences make whole micro-batches that the schedule can run."""
    batch, micro = config.train.batch_sequences, config.train.micro_batch_sequences
    if micro % (group := config.router.group_sequences):
        raise UserError(
            f"train.micro_batch_sequences = {micro}: must be a multiple of router.group_sequences ({group})"
        )
    if batch % (micro * layout.dp):
        raise UserError(
            f"train.batch_sequences = {batch}: must be a multiple of train.micro_batch_sequences x dp = {micro} x "
            f"{layout.dp} = {micro * layout.dp}"
        )
    require_schedule(layout.schedule, len(layout.stages), layout.pp, batch // (micro * layout.dp))
