"""The layout that serves a model: every layer shared by all ranks, nothing needs to divide."""

from __future__ import annotations

from collections.abc import Sequence

from moeforge.errors import UserError
from moeforge.layout.build import build_layout
from moeforge.layout.layout import Layout
from moeforge.layout.shape import ModelShape


def serving_layout(config: ModelShape, tp: int, weights: Sequence[float] | None = None) -> Layout:
    """One stage whose layers `tp` ranks share after `weights` (None: equal), the remainders rotating over the layers.

    Attention goes by whole KV groups (a rank may have none in a layer), feed-forwards and every expert by columns in
    blocks of 16 where there is a block for every rank, the vocabulary by rows. Each rank holds columns of all experts.

    Raises UserError for less than one rank, for more than the narrowest feed-forward has columns, and for weights that
    do not fit.
    """
    if tp < 1:
        raise UserError(f"tensor_parallel_size = {tp}: must be at least 1")
    columns = min(_columns(config, layer) for layer in range(config.num_layers))
    if tp > columns:
        raise UserError(
            f"tensor_parallel_size = {tp}: must be at most {columns}, the columns of the model's narrowest feed-forward"
        )
    return build_layout(config, tp=tp, ep=1, etp=tp, weights=weights)


def _columns(config: ModelShape, layer: int) -> int:
    moe = config.moe if config.is_moe_layer(layer) else None
    return config.ffn_size if moe is None else moe.expert_size
