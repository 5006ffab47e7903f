"""A rank's columns of all experts."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from moeforge.kernels import PreparedExperts, expert_mlp_reference
from moeforge.layout import serving_layout
from moeforge.parallel import Group, Traffic, Watchdog
from moeforge.serve.dispatcher import ServingDispatcher
from moeforge.serve.shard import ServingShard

from .families import family

LAYOUT = serving_layout(family("mixtral"), 1)


def dispatcher(columns: tuple[int, int]) -> ServingDispatcher:
    held = LAYOUT.expert_ranks[0]
    shard = ServingShard(Group("tp", (0,), 0, None, Traffic(1), Watchdog()), LAYOUT, ordered=False)
    return ServingDispatcher(shard, replace(held, columns=(columns,) * 3))


def routed(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x_TD = torch.randn(tokens, 32, generator=generator)
    weights_TK, experts_TK = torch.rand(tokens, 5, generator=generator).topk(2, dim=1)
    return x_TD, weights_TK, experts_TK


@pytest.mark.parametrize("tokens", [1, 7, 90, 400])
def test_the_result_is_that_of_one_process(tokens: int) -> None:
    x_TD, weights_TK, experts_TK = routed(tokens)

    def experts(x_RD: Tensor, offsets_E: Tensor) -> Tensor:
        factors_R = torch.repeat_interleave(1.0 + torch.arange(5), offsets_E.diff(prepend=offsets_E.new_zeros(1)))
        return x_RD * factors_R[:, None]

    out = dispatcher((0, 48)).route(1, x_TD, weights_TK, experts_TK, None, 5, experts)
    torch.testing.assert_close(out, x_TD * (weights_TK * (1.0 + experts_TK)).sum(1, keepdim=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prepared_experts_take_tokens_as_they_come(dtype: torch.dtype) -> None:
    x_TD, weights_TK, experts_TK = routed(33)
    w13, w2 = torch.randn(5, 96, 32).to(dtype) / 6, torch.randn(5, 32, 48).to(dtype) / 7
    plain = partial(expert_mlp_reference, w13=w13, w2=w2)
    route = dispatcher((0, 48)).route
    out = route(1, x_TD.to(dtype), weights_TK, experts_TK, None, 5, PreparedExperts(w13, w2, dtype))
    expected = route(1, x_TD.to(dtype), weights_TK, experts_TK, None, 5, lambda x, offsets: plain(x, offsets_E=offsets))
    torch.testing.assert_close(out, expected, **({} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}))


def test_a_rank_without_columns_computes_nothing() -> None:
    x_TD, weights_TK, experts_TK = routed(7)

    def experts(x_RD: Tensor, offsets_E: Tensor) -> Tensor:
        raise AssertionError

    out = dispatcher((48, 48)).route(1, x_TD, weights_TK, experts_TK, None, 5, experts)
    assert torch.equal(out, torch.zeros_like(x_TD))
