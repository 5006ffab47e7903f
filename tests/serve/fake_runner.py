"""Runners for tests of ranks, found by worker processes under this module's name."""

from __future__ import annotations

import json
import os
import time
from typing import Any

import torch
from torch import Tensor

from moeforge.checkpoint import open_checkpoint
from moeforge.config.serving import EngineConfig
from moeforge.errors import UserError
from moeforge.layout import Layout
from moeforge.model import DenseAttention, ForwardContext
from moeforge.serve.dispatcher import ServingDispatcher
from moeforge.serve.load import load_rank
from moeforge.serve.ranks import Rank
from moeforge.serve.shard import ServingShard
from moeforge.serve.step import StepBatch


class WholeRunner:
    """Runs whole sequences of equal length without a cache."""

    def __init__(self, config: EngineConfig, model: str, layout: Layout, rank: Rank) -> None:
        shard = ServingShard(rank.group, layout, config.deterministic)
        dispatcher = ServingDispatcher(shard, layout.expert_ranks[rank.index])
        self.seams: dict[str, Any] = {"shard": shard, "dispatcher": dispatcher}
        self.model = load_rank(open_checkpoint(model), layout, rank.index, torch.float32, rank.device)
        self.num_blocks = rank.least(100 - rank.index)

    @torch.inference_mode()
    def forward(self, batch: StepBatch) -> Tensor:
        tokens = torch.tensor([token for s in batch.sequences for token in s.tokens])
        length = len(batch.sequences[0].tokens)
        context = ForwardContext(DenseAttention(len(batch.sequences), length), **self.seams)
        hidden = self.model(tokens, torch.arange(length).repeat(len(batch.sequences)), context)
        rows = [i * length + length - 1 for i, s in enumerate(batch.sequences) if s.samples]
        return self.model.logits(hidden[rows], context)


class OddRunner:
    """Sums over the ranks; misbehaves as `model`, a JSON object, says: {"fails": rank, "how": ..., "when": ...}."""

    def __init__(self, config: EngineConfig, model: str, layout: Layout, rank: Rank) -> None:
        self.rank, self.orders = rank, json.loads(model)
        print("noise on standard output")  # which must not disturb
        self._misbehave("start")
        self.num_blocks = rank.least(10 + rank.index) + (rank.index if self.orders.get("uneven") else 0)

    def _misbehave(self, when: str) -> None:
        if self.orders.get("fails") != self.rank.index or self.orders["when"] != when:
            return
        match self.orders["how"]:
            case "user":
                raise UserError("model = 'x': must be another one")
            case "error":
                raise ValueError("something odd")
            case "memory":
                raise torch.OutOfMemoryError("no memory for 7 GB")
            case "exit":
                os._exit(3)
            case "sleep":
                time.sleep(3600)

    def forward(self, batch: StepBatch) -> Tensor:
        self._misbehave("forward")
        first = torch.tensor([[float(batch.sequences[0].tokens[0])]])
        return self.rank.group.all_reduce(first)


def whole(config: EngineConfig, model: str, layout: Layout, rank: Rank) -> WholeRunner:
    return WholeRunner(config, model, layout, rank)


def odd(config: EngineConfig, model: str, layout: Layout, rank: Rank) -> OddRunner:
    return OddRunner(config, model, layout, rank)
