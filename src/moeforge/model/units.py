"""The units of the model: a flat list of embedding, attention and feed-forward residual units, and head.

Each is constructed with its local sizes; what a rank does not hold, another one adds in `Shard.leave`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moeforge.config.model import ModelConfig
from moeforge.kernels import (
    PreparedExperts,
    PreparedWeight,
    expert_mlp,
    linear,
    rms_norm,
    rotate,
    swiglu,
    swiglu_invariant,
)
from moeforge.model.context import ForwardContext
from moeforge.model.router import Router

Rotary = tuple[Tensor, Tensor]


class Weight(nn.Module):
    """A bare weight with a name: `x.weight`."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(*shape))


class Linear(Weight):
    """A linear map `x.weight` [rows, columns], and `x.bias` where asked."""

    def __init__(self, rows: int, columns: int, bias: bool = False) -> None:
        super().__init__(rows, columns)
        self.bias = nn.Parameter(torch.empty(rows)) if bias else None
        self.prepared: PreparedWeight | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x W^T + bias."""
        return self.project(x) if self.bias is None else linear(x, self.prepared or self.weight, self.bias)

    def project(self, x: Tensor) -> Tensor:
        """x W^T alone."""
        return linear(x, self.prepared or self.weight)

    def prepare(self, deterministic: bool) -> None:
        """Keep the weight as inference wants it, and only so."""
        self.prepared = PreparedWeight(self.weight.detach(), deterministic)
        del self.weight


class Embedding(nn.Module):
    """tokens_T -> x_TD."""

    def __init__(self, config: ModelConfig, rows: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, config.hidden_size))

    def forward(self, tokens_T: Tensor, rotary: Rotary, context: ForwardContext) -> Tensor:
        return context.shard.embed(tokens_T, self.weight)


class Attention(nn.Module):
    """x + o(attend(q, k, v)): grouped-query attention, q/k/v fused by KV group as [H/G query heads, key, value]."""

    def __init__(self, config: ModelConfig, layer: int, groups: int) -> None:
        super().__init__()
        self.config, self.layer, self.groups = config, layer, groups
        h, per_group = config.head_dim, config.heads_per_group
        self.norm = Weight(config.hidden_size)
        self.qkv = Linear(groups * (per_group + 2) * h, config.hidden_size, bias=config.qkv_bias)
        if config.qk_norm != "none":
            full = config.qk_norm == "full"
            self.q_norm = Weight(groups * per_group * h if full else h)
            self.k_norm = Weight(groups * h if full else h)
        self.o = Linear(config.hidden_size, groups * per_group * h, bias=config.output_bias)

    def forward(self, x_TD: Tensor, rotary: Rotary, context: ForwardContext) -> Tensor:
        config = self.config
        h, per_group, groups = config.head_dim, config.heads_per_group, self.groups
        u_TD = context.shard.enter(rms_norm(x_TD, self.norm.weight, config.norm_eps))
        tokens = u_TD.shape[0]  # no -1 below: it is undefined where a rank has no groups
        qkv = self.qkv(u_TD).view(tokens, groups, per_group + 2, h)
        q, k, v = (y.flatten(1, 2) for y in qkv.split((per_group, 1, 1), dim=2))
        if config.qk_norm == "full":
            width, eps, norm = config.num_kv_heads * h, config.norm_eps, context.shard.norm
            q = norm(q.flatten(1), self.q_norm.weight, eps, width * per_group).view_as(q)
            k = norm(k.flatten(1), self.k_norm.weight, eps, width).view_as(k)
        elif config.qk_norm == "head":
            q = rms_norm(q, self.q_norm.weight, config.norm_eps)
            k = rms_norm(k, self.k_norm.weight, config.norm_eps)
        out = context.attention.attend(self.layer, rotate(q, *rotary), rotate(k, *rotary), v, config.window(self.layer))
        y_TD = x_TD + context.shard.leave(self.o.project(out.flatten(1)))
        # The bias is whole on every rank, so it comes after the ranks are summed.
        return y_TD if self.o.bias is None else y_TD + self.o.bias


class FeedForward(nn.Module):
    """x + w2(silu(gate) * up): the dense feed-forward of F local columns."""

    def __init__(self, config: ModelConfig, layer: int, columns: int) -> None:
        super().__init__()
        self.eps = config.norm_eps
        self.norm = Weight(config.hidden_size)
        self.w13 = Linear(2 * columns, config.hidden_size)
        self.w2 = Linear(config.hidden_size, columns)

    def forward(self, x_TD: Tensor, rotary: Rotary, context: ForwardContext) -> Tensor:
        u_TD = context.shard.enter(rms_norm(x_TD, self.norm.weight, self.eps))
        prepared = self.w13.prepared
        activation = swiglu_invariant if prepared is not None and prepared.deterministic else swiglu
        return x_TD + context.shard.leave(self.w2(activation(self.w13(u_TD))))


class Experts(nn.Module):
    """Stacked weights of the local experts: w13 [e, 2F, D] gate rows first, w2 [e, D, F]."""

    def __init__(self, hidden_size: int, experts: int, columns: int) -> None:
        super().__init__()
        self.w13 = nn.Parameter(torch.empty(experts, 2 * columns, hidden_size))
        self.w2 = nn.Parameter(torch.empty(experts, hidden_size, columns))
        self.prepared: PreparedExperts | None = None

    def prepare(self, deterministic: bool) -> None:
        """Keep the weights as inference on a CPU wants them, and only so; on other devices they stay."""
        if self.w13.device.type == "cpu":
            self.prepared = PreparedExperts(self.w13.detach(), self.w2.detach(), deterministic)
            del self.w13, self.w2

    def forward(self, x_RD: Tensor, offsets_e: Tensor) -> Tensor:
        if self.prepared is not None:
            return self.prepared(x_RD, offsets_e)
        return expert_mlp(x_RD, self.w13, self.w2, offsets_e)


class MoEFeedForward(nn.Module):
    """x + sum over the chosen experts of weight * expert(x)."""

    def __init__(self, config: ModelConfig, layer: int, experts: int, columns: int) -> None:
        super().__init__()
        assert config.moe is not None
        self.eps, self.num_experts = config.norm_eps, config.moe.num_experts
        self.norm = Weight(config.hidden_size)
        self.router = Router(config.hidden_size, config.moe, layer)
        self.experts = Experts(config.hidden_size, experts, columns)

    def forward(self, x_TD: Tensor, rotary: Rotary, context: ForwardContext) -> Tensor:
        u_TD, (weights_TK, experts_TK, kept_TK) = self.router(rms_norm(x_TD, self.norm.weight, self.eps), context)
        return x_TD + context.dispatcher.route(
            self.router.layer, u_TD, weights_TK, experts_TK, kept_TK, self.num_experts, self.experts
        )


class Head(nn.Module):
    """Final norm; the output projection [V, D] is `weight`, or None where it is tied to the embedding."""

    def __init__(self, config: ModelConfig, rows: int) -> None:
        super().__init__()
        self.eps = config.norm_eps
        self.norm = Weight(config.hidden_size)
        self.weight = None if config.tie_embeddings else nn.Parameter(torch.empty(rows, config.hidden_size))

    def forward(self, x_TD: Tensor, rotary: Rotary, context: ForwardContext) -> Tensor:
        return rms_norm(x_TD, self.norm.weight, self.eps)
