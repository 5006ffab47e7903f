"""All ranks of a layout in one process give the logits of one."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from moeforge.layout import Layout, serving_layout
from moeforge.model import DenseAttention, Transformer
from moeforge.serve.virtual import VirtualRanks

from .families import FAMILIES, cut, family, logits_of, random_inputs, random_model

SPLITS: dict[str, tuple[int, Sequence[float] | None]] = {
    **{f"tp {tp}": (tp, None) for tp in (1, 2, 3, 5, 7, 8)},
    "24 and 8 GB": (2, (24, 8)),
    "one without anything": (3, (1, 0, 2)),
}


@torch.inference_mode()
def virtual_logits(whole: Transformer, layout: Layout, tokens_T: Tensor, positions_T: Tensor) -> Tensor:
    ranks = VirtualRanks([cut(whole, layout, rank) for rank in range(layout.tp)], layout)
    positions = int(positions_T.max()) + 1
    attentions = [DenseAttention(len(tokens_T) // positions, positions) for _ in range(layout.tp)]
    return ranks.logits(ranks.forward(tokens_T, positions_T, attentions))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", FAMILIES)
def test_any_layout_gives_the_logits_of_one_rank(name: str, split: str, dtype: torch.dtype) -> None:
    whole = random_model(family(name), dtype)
    tp, weights = SPLITS[split]
    layout = serving_layout(whole.config, tp, weights)
    inputs = random_inputs(whole.config)
    expected = logits_of(whole, *inputs)
    found = virtual_logits(whole, layout, *inputs)
    assert found.shape == expected.shape and found.dtype == dtype
    tolerance = 1e-9 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("tp", [5, 8])
def test_those_layouts_have_ranks_without_groups(tp: int) -> None:
    layout = serving_layout(family("llama"), tp)
    assert all(any(begin == end for begin, end in shard.kv_groups) for shard in layout.ranks)


@pytest.mark.parametrize("name", ["llama", "olmoe"])
def test_prepared_weights(name: str) -> None:
    whole = random_model(family(name), torch.float32)
    layout = serving_layout(whole.config, 5)
    inputs = random_inputs(whole.config)
    ranks = VirtualRanks([cut(whole, layout, rank).prepare(whole.config.max_positions) for rank in range(5)], layout)
    with torch.inference_mode():
        found = ranks.logits(ranks.forward(*inputs, [DenseAttention(2, 9) for _ in range(5)]))
    torch.testing.assert_close(found, logits_of(whole, *inputs), rtol=1e-4, atol=1e-4)


def test_a_missing_part_is_seen() -> None:
    """The agreement above is not for want of anything to see."""
    whole = random_model(family("mixtral"))
    layout = serving_layout(whole.config, 3)
    inputs = random_inputs(whole.config)
    for name in ("layers.1.attention.o.weight", "layers.2.ffn.experts.w2", "embed.weight", "head.weight"):
        ranks = [cut(whole, layout, rank) for rank in range(3)]
        ranks[1].get_parameter(name).zero_()
        virtual = VirtualRanks(ranks, layout)
        with torch.inference_mode():
            found = virtual.logits(virtual.forward(*inputs, [DenseAttention(2, 9) for _ in range(3)]))
        assert (found - logits_of(whole, *inputs)).abs().max() > 1e-3, name
