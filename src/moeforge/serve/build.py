"""What an engine is made of: the opened model, its layout, and the runner of one rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moeforge.checkpoint import Checkpoint, open_checkpoint
from moeforge.checkpoint.inference import named_dtype, pick_dtype
from moeforge.checkpoint.tokenizer import load_tokenizer, tokenizer_files
from moeforge.config.model import ModelConfig
from moeforge.config.named import named_config
from moeforge.config.section import expanded
from moeforge.config.serving import EngineConfig
from moeforge.errors import UserError
from moeforge.heap import keep_freed_memory
from moeforge.layout import Layout
from moeforge.layout.serving import serving_layout
from moeforge.serve.dispatcher import ServingDispatcher
from moeforge.serve.kv_cache import KVCache
from moeforge.serve.load import check_serving_layout, dummy_rank, load_rank
from moeforge.serve.memory import block_count, free_bytes, require_memory
from moeforge.serve.ranks import Rank
from moeforge.serve.runner import Runner
from moeforge.serve.shard import ServingShard


@dataclass(frozen=True)
class OpenedModel:
    """A model of which nothing has been loaded yet but the tokenizer, None where none was wanted."""

    config: ModelConfig
    tokenizer: Any | None

    @property
    def ends(self) -> frozenset[int]:
        """Tokens that end a text."""
        ends = set(self.config.eos_token_ids)
        if self.tokenizer is not None and self.tokenizer.eos_token_id is not None:
            ends.add(self.tokenizer.eos_token_id)
        return frozenset(ends)


def open_model(settings: EngineConfig, model: str) -> OpenedModel:
    """Raises UserError for what is no model, or has no tokenizer where one is wanted."""
    config, checkpoint = _described(settings, model)
    if settings.skip_tokenizer_init:
        return OpenedModel(config, None)
    try:
        return OpenedModel(config, _tokenizer(model) if checkpoint is None else checkpoint.tokenizer())
    except UserError as error:
        raise UserError(f"{error}; with skip_tokenizer_init token ids alone are served") from error


def _tokenizer(model: str) -> Any:
    path = expanded(model)
    if not tokenizer_files(path):
        raise UserError(f"model = {model!r}: has no tokenizer")
    return load_tokenizer(path)


def _described(settings: EngineConfig, model: str) -> tuple[ModelConfig, Checkpoint | None]:
    """The configuration, and the checkpoint where there are weights: dummy ones need none."""
    if settings.load_format == "dummy" and (config := named_config(model)) is not None:
        return config, None
    checkpoint = open_checkpoint(model)
    return checkpoint.config, checkpoint


def layout_of(settings: EngineConfig, config: ModelConfig) -> Layout:
    """The plan's layout, or shards after `gpu_split`. Raises UserError for a plan of another model or of training."""
    if settings.plan is None:
        return serving_layout(config, settings.tensor_parallel_size, settings.gpu_split)
    if settings.gpu_split is not None:
        raise UserError("gpu_split with plan: the plan says how the ranks share the model; give one of both")
    layout = Layout.read(settings.plan)
    if settings.tensor_parallel_size not in (1, layout.world_size):
        raise UserError(
            f"tensor_parallel_size = {settings.tensor_parallel_size}: the plan is for {layout.world_size} ranks"
        )
    check_serving_layout(layout, config)
    return layout


def length_limit(settings: EngineConfig, config: ModelConfig) -> int:
    """Most positions of a sequence. Raises UserError for more than the model has."""
    positions, rope = config.max_positions, config.rope
    if rope.kind == "dynamic":
        # Beyond these its angles depend on the longest sequence that is computed, and keys are kept with older ones.
        positions = min(positions, rope.original_max_positions or positions)
    wanted = settings.max_model_len or positions
    if wanted > positions:
        why = " (its dynamic rope scaling is not served)" if positions < config.max_positions else ""
        raise UserError(f"max_model_len = {wanted}: must be between 1 and the model's {positions}{why}")
    return wanted


def make_runner(settings: EngineConfig, model: str, layout: Layout, rank: Rank) -> Runner:
    """Loads what a rank holds. Raises UserError where it does not fit."""
    if settings.deterministic and rank.device.type != "cpu":
        raise UserError("deterministic = true: is for device = cpu; a GPU's grouped matmuls cannot promise it")
    if rank.device.type == "cpu":
        keep_freed_memory()  # and huge pages, for keys and values too
    config, checkpoint = _described(settings, model)
    dtype = named_dtype(settings.dtype) if checkpoint is None else pick_dtype(settings.dtype, checkpoint)
    free = free_bytes(rank.device)
    if rank.device.type == "cpu":  # one memory for all: looked at before any of them takes of it
        free = rank.least(free)
    require_memory(config, layout, rank.index, dtype, rank.device, free)
    if checkpoint is None or settings.load_format == "dummy":
        loaded = dummy_rank(config, layout, rank.index, dtype, rank.device)
    else:
        loaded = load_rank(checkpoint, layout, rank.index, dtype, rank.device)
    limit = length_limit(settings, config)
    loaded.prepare(limit, settings.deterministic)
    blocks = rank.least(block_count(settings, config, layout, rank.index, dtype, rank.device, limit))
    groups = [end - begin for begin, end in layout.ranks[rank.index].kv_groups]
    fp8 = settings.kv_cache_dtype == "fp8"
    cache = KVCache(groups, config.head_dim, blocks, settings.block_size, dtype, fp8, rank.device)
    shard = ServingShard(rank.group, layout, settings.deterministic)
    dispatcher = ServingDispatcher(shard, layout.expert_ranks[rank.index])
    return Runner(loaded, cache, shard, dispatcher, settings.deterministic)
