"""What one forward pass is given besides tokens: the seams, and how tokens form routing groups."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from moeforge.model.attention_context import AttentionContext
from moeforge.model.dispatcher import Dispatcher, LocalDispatcher
from moeforge.model.record import RouterRecord
from moeforge.model.shard import Shard, SingleShard


@dataclass(frozen=True)
class RoutingGroups:
    """Groups of whole sequences over which capacity and balance are counted (training only).

    `count` groups of T / count tokens each; `valid_T` false for padding, which is neither routed nor counted.
    With `drop`, assignments beyond capacity C = ceil(capacity_factor * N / E) of their group are dropped in token
    order, where N = K times the group's valid tokens. `sequences` is the number of sequences in all groups, which the
    sequence-wise balance loss is counted over; None: a group is one sequence.
    """

    count: int
    valid_T: Tensor | None = None
    capacity_factor: float = 1.25
    drop: bool = False
    sequences: int | None = None


@dataclass(frozen=True)
class ForwardContext:
    """The three seams, and in training the record that router statistics are assigned to."""

    attention: AttentionContext
    dispatcher: Dispatcher = field(default_factory=LocalDispatcher)
    shard: Shard = field(default_factory=SingleShard)
    groups: RoutingGroups | None = None
    record: RouterRecord | None = None
    micro_batch: int = 0
