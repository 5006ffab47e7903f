"""A plan in the words of other trainers: Megatron-LM's layout string, torchtitan's module lists.

What they can express is read from NVIDIA/Megatron-LM (megatron/core/transformer/pipeline_parallel_layer_layout.py,
transformer_config.py, megatron/core/recompute.py, megatron/training/arguments.py; August 2026) and pytorch/torchtitan
(torchtitan/distributed/pipeline_parallel.py, models/common/decoder.py; v0.2.2 and main of August 2026).
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from moeforge.config.model import ModelConfig
from moeforge.errors import UserError
from moeforge.layout import Layout, Stage, unit_names

_MEGATRON_SCHEDULES = ("1f1b", "interleaved-1f1b")
_TORCHTITAN_SCHEDULES = {
    "1f1b": "1F1B",
    "interleaved-1f1b": "Interleaved1F1B",
    "zero-bubble": "InterleavedZeroBubble",
    "zbv": "ZBVZeroBubble",
}


@dataclass(frozen=True)
class Export:
    """`text` for the other trainer; `notes`, one line each: what it must be told besides, and what it cannot do."""

    text: str
    notes: tuple[str, ...] = ()


def megatron_layout(layout: Layout, config: ModelConfig) -> Export:
    """The value of Megatron-LM's `--pipeline-model-parallel-layout`, to be quoted in a shell: `Et*5|t*4|...|t*4L`.

    E is the embedding, t a layer, L final norm, head and loss, `t*4` four layers; `|` stands between stages, which may
    be empty. Stage s runs on rank s mod pp: rounds of pp stages are the virtual stages of an interleaved schedule.

    Raises UserError for a layout that is not of this model, and for what Megatron has not: stages that begin inside a
    layer, zero-bubble schedules and their V placement, an embedding or a head that is not on the first or last stage,
    heads, columns or experts that do not divide.
    """
    layout.check(config, layout.world_size)
    if layout.pp > 1 and layout.schedule not in _MEGATRON_SCHEDULES:
        raise UserError(
            f'parallel.schedule = "{layout.schedule}": Megatron has {" and ".join(_MEGATRON_SCHEDULES)}, with stage s '
            "on rank s mod pp; plan with one of these"
        )
    _require_pipeline(layout, "Megatron")
    _require_whole_layers(layout, config, "Megatron")
    for index, end in ((0, "embedding"), (len(layout.stages) - 1, "head")):
        if _is_empty(layout.stages[index]):
            raise UserError(f"layout stages.{index}: is empty, but Megatron builds the {end} there; plan again")
    _require_divisible(layout, config, "Megatron", _megatron_rules(layout, config))
    text = "|".join(_letters(stage, config) for stage in layout.stages)
    return Export(text, (*_megatron_recompute(layout, config), *_uneven(layout, config, "Megatron")))


def torchtitan_modules(layout: Layout, config: ModelConfig) -> Export:
    """The value of torchtitan's `parallelism.module_fqns_per_model_part`, as JSON: module names by stage.

    Stages are in pipeline order under every schedule; torchtitan itself gives rank r every pp-th of them, and under
    ZBVZeroBubble r and 2 pp - 1 - r. The head is `lm_head`, as since April 2026 (`output` up to v0.2.2).

    Raises UserError for a layout that is not of this model, and for what torchtitan has not: stages that begin inside
    a layer or hold nothing, tied embeddings in a pipeline, heads or experts that do not divide.
    """
    layout.check(config, layout.world_size)
    _require_pipeline(layout, "torchtitan")
    _require_whole_layers(layout, config, "torchtitan")
    for index, stage in enumerate(layout.stages):
        if _is_empty(stage):
            raise UserError(
                f"layout stages.{index}: is empty, but torchtitan's optimiser wants parameters in every stage; plan "
                "with fewer stages"
            )
    if config.tie_embeddings and layout.pp > 1:
        raise UserError(
            f"tie_embeddings = true with parallel.pp = {layout.pp}: torchtitan refuses tied embeddings in a pipeline; "
            "untie them, or plan with pp = 1"
        )
    _require_divisible(layout, config, "torchtitan", _torchtitan_rules(layout, config))
    names = unit_names(config)
    parts = [_modules(names[stage.begin_unit : stage.end_unit]) for stage in layout.stages]
    notes = ["torchtitan up to v0.2.2 calls the head output, not lm_head"]
    if layout.pp > 1:
        notes.append(f'set parallelism.pipeline_parallel_schedule = "{_TORCHTITAN_SCHEDULES[layout.schedule]}"')
    if layout.etp > 1:
        notes.append(
            f"torchtitan dropped expert tensor parallelism after v0.2.2; this plan has parallel.etp = {layout.etp}"
        )
    notes += [*_torchtitan_recompute(layout, config), *_uneven(layout, config, "torchtitan")]
    return Export(json.dumps(parts), tuple(notes))


def _letters(stage: Stage, config: ModelConfig) -> str:
    """A stage of whole layers in Megatron's letters."""
    layers = _layers(stage, config)
    repeated = "t" if layers == 1 else f"t*{layers}" if layers else ""
    embed = stage.begin_unit == 0 < stage.end_unit
    head = stage.begin_unit < stage.end_unit == _units(config)
    return "E" * embed + repeated + "L" * head


def _modules(units: tuple[str, ...]) -> list[str]:
    """A stage of whole layers in torchtitan's names."""
    ends = {"embed": ["tok_embeddings"], "head": ["norm", "lm_head"]}
    found = [name for unit in units for name in ends.get(unit, [unit.rpartition(".")[0]])]
    return list(dict.fromkeys(found))  # a layer is two units


def _units(config: ModelConfig) -> int:
    return 2 * config.num_layers + 2


def _is_empty(stage: Stage) -> bool:
    return stage.begin_unit == stage.end_unit


def _layers(stage: Stage, config: ModelConfig) -> int:
    """The layers of a stage of whole layers."""
    begin, end = max(stage.begin_unit, 1), min(stage.end_unit, _units(config) - 1)
    return max(end - begin, 0) // 2


def _require_pipeline(layout: Layout, target: str) -> None:
    if layout.pp == 1 and layout.chunks > 1:
        raise UserError(
            f"parallel.pp = 1 with {layout.chunks} stages: {target} has several stages a rank only with 2 pipeline "
            "ranks or more; plan with chunks = 1"
        )


def _require_whole_layers(layout: Layout, config: ModelConfig, target: str) -> None:
    names = unit_names(config)
    for index, stage in enumerate(layout.stages):
        if not _is_empty(stage) and names[stage.begin_unit].endswith(".ffn"):
            layer = names[stage.begin_unit].split(".")[1]
            raise UserError(
                f"layout stages.{index}.begin_unit = {stage.begin_unit}: between attention and feed-forward of layer "
                f"{layer}, but {target} moves whole layers only; plan with --whole-layers"
            )


Rule = tuple[str, int, str, int]
"""A key of the model and its value, which a key of [parallel] and its value must divide."""


def _megatron_rules(layout: Layout, config: ModelConfig) -> list[Rule]:
    rules = [("num_heads", config.num_heads, "tp", layout.tp)]
    if layout.tp % config.num_kv_heads:  # else it copies KV heads: each to tp / num_kv_heads ranks
        rules.append(("num_kv_heads", config.num_kv_heads, "tp", layout.tp))
    if len(config.moe_layers) < config.num_layers:
        rules.append(("ffn_size", config.ffn_size, "tp", layout.tp))
    if config.moe is not None:
        rules.append(("moe.num_experts", config.moe.num_experts, "ep", layout.ep))
        rules.append(("moe.expert_size", config.moe.expert_size, "etp", layout.etp))
    return rules


def _torchtitan_rules(layout: Layout, config: ModelConfig) -> list[Rule]:
    rules = [("num_heads", config.num_heads, "tp", layout.tp), ("num_kv_heads", config.num_kv_heads, "tp", layout.tp)]
    if config.moe is not None:
        rules.append(("moe.num_experts", config.moe.num_experts, "ep", layout.ep))
    return rules


def _require_divisible(layout: Layout, config: ModelConfig, target: str, rules: list[Rule]) -> None:
    for key, size, by, ranks in rules:
        if size % ranks:
            raise UserError(
                f"parallel.{by} = {ranks}: {target} gives every rank the same share, so it must divide {key} ({size})"
            )


def _uneven(layout: Layout, config: ModelConfig, target: str) -> list[str]:
    """A note where the plan's shares differ although equal ones exist."""
    shares: dict[str, list[tuple[tuple[int, int], ...]]] = {
        "KV groups": [shard.kv_groups for shard in layout.ranks],
        "feed-forward columns": [shard.ffn_columns for shard in layout.ranks],
        "experts": [shard.experts for shard in layout.expert_ranks],
        "expert columns": [shard.columns for shard in layout.expert_ranks],
    }
    different = [
        what
        for what, ranks in shares.items()
        if any(len({end - begin for begin, end in layer}) > 1 for layer in zip(*ranks, strict=True))
    ]
    if not different:
        return []
    return [f"this plan gives ranks unequal {', '.join(different)}; {target} divides them its own way"]


def _recomputed(stage: Stage, config: ModelConfig) -> int | None:
    """How many layers a stage recomputes, if whole ones and its first; else None."""
    count, rest = divmod(len(stage.recompute), 2)
    first = max(stage.begin_unit, 1)
    wanted = unit_names(config)[first : first + 2 * count]
    return count if not rest and set(wanted) == set(stage.recompute) else None


def _megatron_recompute(layout: Layout, config: ModelConfig) -> list[str]:
    if not any(stage.recompute for stage in layout.stages):
        return []
    counts = [_recomputed(stage, config) for stage in layout.stages]
    known = [count for count in counts if count is not None]
    if len(known) < len(counts):
        return [
            "Megatron recomputes the first layers of every stage, whole, or parts of all layers "
            "(--recompute-modules); this plan recomputes other units, which must be chosen by hand"
        ]
    most = max(known)
    flags = f"--recompute-granularity full --recompute-method block --recompute-num-layers {most}"
    if known == [min(most, _layers(stage, config)) for stage in layout.stages]:
        return [f"set {flags}"]
    shown = ", ".join(map(str, known))
    return [
        f"Megatron has one number of recomputed layers for all stages, this plan [{shown}]: {flags} keeps within "
        "the plan's memory, but recomputes more and takes longer"
    ]


def _torchtitan_recompute(layout: Layout, config: ModelConfig) -> list[str]:
    found = sum(len(stage.recompute) for stage in layout.stages)
    if found == 2 * config.num_layers:
        return ["set full activation checkpointing"]
    if found:
        return [
            f"torchtitan checkpoints all layers or none; this plan recomputes {found} of {2 * config.num_layers} layer "
            "halves: full activation checkpointing keeps within the plan's memory, but takes longer"
        ]
    return []
