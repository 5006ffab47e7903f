"""The training file as types: every section and key, its default, what is allowed, what it means.

The descriptions are the source of `train --init` (`template.py`) and of docs/configuration.md (`docs.py`).
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from moeforge.config.parallel import ParallelSection
from moeforge.config.section import Count, CountOrZero, Decay, NonNegative, Positive, Section, Share, Text, refuse


class RunSection(Section):
    """Where the run lives and what it writes down."""

    dir: Text = Field(default="runs/default", description="Run directory: config, metrics, checkpoints and result.")
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(
        default=0, description="Seed of the data order and of the choice of held-out documents."
    )
    deterministic: bool = Field(
        default=False,
        description="The same losses and weights, bit for bit, each time on the same devices, layout and versions, "
        "which exact resume on a GPU needs: torch's deterministic algorithms, cuBLAS with fixed workspaces, NCCL "
        "without sums in switches. Slower on GPUs; a CPU run repeats without it, given as many threads.",
    )
    similarity_every: CountOrZero = Field(
        default=20, description="Steps between two measurements of expert similarity (0 = never)."
    )
    gate_distribution_every: CountOrZero = Field(
        default=50, description="Steps between two records of the mean sorted gate probabilities (0 = never)."
    )
    tensorboard: bool = Field(default=True, description="Also write TensorBoard event files into the run directory.")


class ModelSection(Section):
    """The model to train and the numbers it is computed in."""

    path: Text = Field(description="Model directory, GGUF file, hub id or preset to start from.")
    precision: Literal["bf16", "bf16_pure", "fp32", "fp64"] = Field(
        default="bf16",
        description="Number format of weights and activations; bf16 keeps fp32 master weights and "
        "moments in the optimizer, bf16_pure keeps everything in bf16.",
    )
    expert_precision: Literal["same", "fp8"] = Field(
        default="same",
        description="Number format of the experts' products; fp8 = e4m3 in the forward pass and for the gradients of "
        "inputs, while weight gradients and what is kept stay in model.precision. Meant for GPUs that multiply such "
        "numbers, where it pays from some 2,000 rows an expert on; elsewhere the same results, slower; ignored for a "
        "dense model.",
    )
    recompute: Literal["none", "all", "attention", "ffn"] | tuple[Text, ...] = Field(
        default="none",
        description="Units whose activations are recomputed in the backward pass to save memory; a list "
        'names them, as in ["layers.0.ffn", "layers.1.attention"].',
    )
    device: Text = Field(
        default="auto", description='Torch device, as in "cpu" or "cuda:0"; auto = a GPU if there is one.'
    )


class DataSource(Section):
    """One corpus of a mixture."""

    path: Text = Field(description="File, directory, glob pattern or hub data set id of the corpus.")
    weight: Positive = Field(
        default=1.0,
        description="How often an epoch reads each sequence of this corpus: 1 = once, 2 = twice, 0.5 = every second "
        "epoch; it multiplies the corpus's natural size and is no share of the mixture. Must be 1 in data.eval.",
    )
    format: Literal["auto", "text", "jsonl", "parquet", "hub"] = Field(
        default="auto", description="How to read the corpus; auto goes by the file name."
    )
    text_field: Text = Field(default="text", description="Field that holds the text (jsonl, parquet, hub).")
    messages_field: Text | None = Field(
        default=None,
        description="Field that holds chat messages; loss is then on the assistant's turns only.",
    )
    split: Text = Field(default="train", description="Split to read from a hub data set.")

    @model_validator(mode="after")
    def _check(self) -> DataSource:
        if self.messages_field is not None and self.format == "text":
            raise refuse("messages_field", f'"{self.messages_field}"', 'must be absent with format = "text"')
        return self


class DataSection(Section):
    """The corpora and how they become sequences."""

    train: Annotated[tuple[DataSource, ...], Field(min_length=1)] = Field(
        description="Corpora to train on; an epoch reads all of them, each as often as its weight says."
    )
    eval: tuple[DataSource, ...] = Field(
        default=(), description="Corpora to evaluate on; empty = hold out some of data.train."
    )
    holdout_fraction: Decay = Field(
        default=0.01,
        description="Share of the documents of data.train held out when data.eval is empty (0 = no evaluation).",
    )
    sequence_length: Annotated[int, Field(ge=2)] = Field(
        default=1024,
        description="Tokens a training sequence; documents are packed, and never see one another.",
    )
    cache_dir: Text = Field(default="cache", description="Directory of the packed token cache, shared between runs.")

    @model_validator(mode="after")
    def _check(self) -> DataSection:
        for index, source in enumerate(self.eval):
            if source.weight != 1:
                raise refuse(f"eval.{index}.weight", source.weight, "must be 1: only data.train has weights")
        return self


class RouterSection(Section):
    """Load balance of the experts (the gate itself belongs to the model); ignored for a dense model."""

    aux_loss: Literal["skywork", "switch", "sequence", "global", "none"] = Field(
        default="skywork",
        description="Balance loss: skywork = sum over experts of (1/E - mean gate)^2 in each routing "
        "group; switch = E*sum(load*mean gate) in each group; sequence = switch over each sequence; "
        "global = switch with the load of the whole batch (running over micro-batches); at equal alpha the "
        "gradient of skywork is E/2 times smaller than that of switch.",
    )
    adaptive: bool = Field(
        default=True,
        description="One alpha a layer, driven by its drop rate; false keeps alpha at alpha_max.",
    )
    alpha_max: NonNegative = Field(default=0.01, description="Start and upper limit of the balance coefficient alpha.")
    xi: NonNegative = Field(
        default=0.2, description="Target alpha per unit of drop rate: f(d) = min(xi * d, alpha_max)."
    )
    beta: Share = Field(default=0.99, description="Memory: alpha <- beta * alpha + (1 - beta) * f(d), once a step.")
    capacity_factor: Positive = Field(
        default=1.25, description="Capacity of an expert, in multiples of its even share of the assignments."
    )
    drop_tokens: bool = Field(
        default=False,
        description="Drop assignments beyond capacity; false only counts them (virtual drop rate).",
    )
    group_sequences: Count = Field(
        default=1, description="Whole sequences in a routing group, the scope of capacity and balance."
    )
    scope: Literal["group", "global"] = Field(
        default="group", description="Capacity per routing group, or of the pooled load of the global batch."
    )

    @model_validator(mode="after")
    def _check(self) -> RouterSection:
        if self.scope == "global" and self.drop_tokens:
            reason = "must be group when router.drop_tokens = true, because tokens are dropped before the rest of"
            raise refuse("scope", '"global"', f"{reason} the batch is routed, when its pooled load is unknown")
        return self


class TrainSection(Section):
    """How long, and how many sequences a step."""

    steps: Count = Field(default=1000, description="Optimizer steps of the whole run.")
    batch_sequences: Count = Field(default=8, description="Sequences in one optimizer step (the global batch).")
    micro_batch_sequences: Count = Field(
        default=4,
        description="Sequences in one forward and backward pass; divides batch_sequences, and is a multiple "
        "of router.group_sequences.",
    )


class OptimizerSection(Section):
    """The update rule."""

    kind: Literal["adamw", "sgd"] = Field(default="adamw", description="AdamW, or plain gradient descent (for tests).")
    lr: Positive = Field(default=1e-4, description="Peak learning rate.")
    expert_lr_scale: Positive = Field(
        default=1.0, description="Learning rate of the expert weights, in multiples of lr."
    )
    betas: tuple[Decay, Decay] = Field(default=(0.9, 0.95), description="Decay of AdamW's first and second moment.")
    eps: Positive = Field(default=1e-8, description="Term added to the root of AdamW's second moment.")
    weight_decay: NonNegative = Field(default=0.1, description="Decoupled weight decay, on matrices only.")
    clip_norm: NonNegative = Field(default=1.0, description="Largest global gradient norm; 0 = no clipping.")


class ScheduleSection(Section):
    """The learning rate over the run."""

    kind: Literal["cosine", "wsd", "constant"] = Field(
        default="cosine", description="Shape after the warm-up; wsd = stable, then a final decay."
    )
    warmup_steps: CountOrZero = Field(default=100, description="Steps of linear warm-up from 0 to the peak.")
    min_lr_ratio: Share = Field(default=0.1, description="Last learning rate, as a share of the peak (cosine, wsd).")
    decay_fraction: Share = Field(default=0.1, description="Share of train.steps spent in the final decay (wsd).")


class EvalSection(Section):
    """Evaluation during training."""

    every: CountOrZero = Field(default=100, description="Steps between two evaluations (0 = only at start and end).")
    sequences: Count = Field(default=64, description="Held-out sequences in an evaluation, at most.")


class CheckpointSection(Section):
    """Saving during training."""

    every: CountOrZero = Field(
        default=200, description="Steps between two checkpoints, with one at the end (0 = none, only the final model)."
    )
    keep: Count = Field(default=2, description="Newest checkpoints to keep.")


class TrainConfig(Section):
    """The whole training file."""

    run: RunSection = RunSection()
    model: ModelSection
    data: DataSection
    router: RouterSection = RouterSection()
    train: TrainSection = TrainSection()
    optimizer: OptimizerSection = OptimizerSection()
    schedule: ScheduleSection = ScheduleSection()
    eval: EvalSection = EvalSection()
    checkpoint: CheckpointSection = CheckpointSection()
    parallel: ParallelSection = ParallelSection()

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        micro, batch = self.train.micro_batch_sequences, self.train.batch_sequences
        group, steps, schedule = self.router.group_sequences, self.train.steps, self.schedule
        # A default is checked where it is used (`check_batch`): a plan may bring another.
        given = self.train.model_fields_set
        if batch % micro and "micro_batch_sequences" in given:
            reason = f"must divide train.batch_sequences ({batch})"
            raise refuse("train.micro_batch_sequences", micro, reason)
        if self.parallel.recompute_layers and self.model.recompute != "none":
            reason = 'must be empty unless model.recompute = "none"'
            raise refuse("parallel.recompute_layers", list(self.parallel.recompute_layers), reason)
        if micro % group and "micro_batch_sequences" in given:
            reason = f"must be a multiple of router.group_sequences ({group})"
            raise refuse("train.micro_batch_sequences", micro, reason)
        if schedule.warmup_steps >= steps:
            raise refuse("schedule.warmup_steps", schedule.warmup_steps, f"must be below train.steps ({steps})")
        if schedule.kind == "wsd" and schedule.warmup_steps + schedule.decay_fraction * steps > steps:
            reason = f"warm-up ({schedule.warmup_steps} steps) and decay must fit into train.steps ({steps})"
            raise refuse("schedule.decay_fraction", schedule.decay_fraction, reason)
        return self
