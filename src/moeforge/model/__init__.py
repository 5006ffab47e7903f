"""The one transformer, the same modules in training and in serving. Knows no process groups, pages or files.

Legend: T tokens, D hidden, F FFN width, E experts, K top-k, H heads, G KV groups, L layers, V vocabulary,
B sequences, S positions, h head dimension.
"""

from moeforge.model.attention_context import AttentionContext, DenseAttention
from moeforge.model.context import ForwardContext, RoutingGroups
from moeforge.model.dispatcher import Dispatcher, LocalDispatcher
from moeforge.model.record import AuxLoss, RouterRecord
from moeforge.model.shard import Shard, SingleShard
from moeforge.model.transformer import Transformer

__all__ = [
    "AttentionContext",
    "AuxLoss",
    "DenseAttention",
    "Dispatcher",
    "ForwardContext",
    "LocalDispatcher",
    "RouterRecord",
    "RoutingGroups",
    "Shard",
    "SingleShard",
    "Transformer",
]
