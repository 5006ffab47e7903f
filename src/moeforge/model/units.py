"""The units of the model: a flat list of embedding, attention and feed-forward residual units, and head.

Each is constructed with its local sizes; what a rank does not hold, another one adds in `Shard.leave`.
"""

from __future__ import annotations

import math

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
    split_qkv,
    split_rotated_qkv,
    swiglu,
    swiglu_invariant,
)
from moeforge.kernels.fp8_experts import fp8_expert_mlp
from moeforge.kernels.fp8_linear import fp8_linear, multiplied_activations
from moeforge.kernels.fp8_weight import GROUP_ROWS, Fp8Weight
from moeforge.model.context import ForwardContext
from moeforge.model.fp8 import Fp8Matrix
from moeforge.model.router import Router

Rotary = tuple[Tensor, Tensor]


class Weight(nn.Module):
    """A bare weight with a name: `x.weight`."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(*shape))


class Linear(Weight):
    """A linear map `x.weight` [rows, columns], and `x.bias` where asked. With `fp8` the weight is e4m3, with `x.scales`
    beside it, and `x.input_scale` for static activations."""

    scales: Tensor | None
    input_scale: Tensor | None

    def __init__(self, rows: int, columns: int, bias: bool = False, fp8: Fp8Matrix | None = None) -> None:
        super().__init__(rows, columns)
        self.fp8, self.scales, self.input_scale = fp8, None, None
        if fp8 is not None:
            self.weight, self.scales, self.input_scale = fp8.parameters(rows, columns)
        self.bias = nn.Parameter(torch.empty(rows)) if bias else None
        self.prepared: PreparedWeight | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x W^T + bias."""
        if self.bias is None or (self.fp8 is not None and self.prepared is None):
            y = self.project(x)
            return y if self.bias is None else y + self.bias
        return linear(x, self.prepared or self.weight, self.bias)

    def project(self, x: Tensor) -> Tensor:
        """x W^T alone."""
        if self.fp8 is not None and self.prepared is None:
            return fp8_linear(x, self.fp8_weight(), self.fp8.activations, self.input_scale)
        return linear(x, self.prepared or self.weight)

    def fp8_weight(self) -> Fp8Weight:
        """The weight as kernels take it, where it is FP8."""
        assert self.fp8 is not None and self.scales is not None
        return self.fp8.weight(self.weight, self.scales)

    def prepare(self, dtype: torch.dtype, deterministic: bool) -> None:
        """Keep the weight as inference in `dtype` wants it, and only so."""
        if self.fp8 is None:
            self.prepared = PreparedWeight(self.weight.detach(), dtype, deterministic)
        else:
            activations = multiplied_activations(self.fp8.activations, self.weight.device)
            weight = self.fp8_weight()
            self.prepared = PreparedWeight(weight, dtype, deterministic, activations, self.input_scale)
            self.scales = None
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

    def __init__(self, config: ModelConfig, layer: int, groups: int, first_group: int = 0) -> None:
        super().__init__()
        self.config, self.layer, self.groups = config, layer, groups
        h, per_group = config.head_dim, config.heads_per_group
        self.norm = Weight(config.hidden_size)
        fp8 = Fp8Matrix.of(config.fp8(f"layers.{layer}.attention.qkv"), aligned=h % GROUP_ROWS == 0)
        self.qkv = Linear(groups * (per_group + 2) * h, config.hidden_size, config.qkv_bias, fp8)
        if config.qk_norm != "none":
            full = config.qk_norm == "full"
            self.q_norm = Weight(groups * per_group * h if full else h)
            self.k_norm = Weight(groups * h if full else h)
        fp8 = Fp8Matrix.of(config.fp8(f"layers.{layer}.attention.o"), first_group * per_group * h)
        self.o = Linear(config.hidden_size, groups * per_group * h, config.output_bias, fp8)

    def forward(self, x_TD: Tensor, rotary: Rotary, context: ForwardContext) -> Tensor:
        config = self.config
        h, per_group, groups = config.head_dim, config.heads_per_group, self.groups
        u_TD = context.shard.enter(rms_norm(x_TD, self.norm.weight, config.norm_eps))
        tokens = u_TD.shape[0]  # no -1 below: it is undefined where a rank has no groups
        qkv = self.qkv(u_TD).view(tokens, groups, per_group + 2, h)
        if config.qk_norm == "none":
            q, k, v = split_rotated_qkv(qkv, *rotary)
        else:
            q, k, v = split_qkv(qkv)
            if config.qk_norm == "full":
                width, eps, norm = config.num_kv_heads * h, config.norm_eps, context.shard.norm
                q = norm(q.flatten(1), self.q_norm.weight, eps, width * per_group).view_as(q)
                k = norm(k.flatten(1), self.k_norm.weight, eps, width).view_as(k)
            else:
                q = rms_norm(q, self.q_norm.weight, config.norm_eps)
                k = rms_norm(k, self.k_norm.weight, config.norm_eps)
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        out = context.attention.attend(self.layer, q, k, v, config.window(self.layer))
        y_TD = x_TD + context.shard.leave(self.o.project(out.flatten(1)))
        # The bias is whole on every rank, so it comes after the ranks are summed.
        return y_TD if self.o.bias is None else y_TD + self.o.bias


class FeedForward(nn.Module):
    """x + w2(silu(gate) * up): the dense feed-forward of F local columns, from the global column `first` on."""

    def __init__(self, config: ModelConfig, layer: int, columns: int, first: int = 0) -> None:
        super().__init__()
        self.eps = config.norm_eps
        self.norm = Weight(config.hidden_size)
        aligned = math.gcd(first, columns) % GROUP_ROWS == 0
        w13 = Fp8Matrix.of(config.fp8(f"layers.{layer}.ffn.w13"), aligned=aligned)
        w2 = Fp8Matrix.of(config.fp8(f"layers.{layer}.ffn.w2"), first)
        self.w13 = Linear(2 * columns, config.hidden_size, fp8=w13)
        self.w2 = Linear(config.hidden_size, columns, fp8=w2)

    def forward(self, x_TD: Tensor, rotary: Rotary, context: ForwardContext) -> Tensor:
        u_TD = context.shard.enter(rms_norm(x_TD, self.norm.weight, self.eps))
        prepared = self.w13.prepared
        activation = swiglu_invariant if prepared is not None and prepared.deterministic else swiglu
        return x_TD + context.shard.leave(self.w2(activation(self.w13(u_TD))))


class Experts(nn.Module):
    """Stacked weights of the local experts: w13 [e, 2F, D] gate rows first, w2 [e, D, F].

    `fp8`: how both are held in e4m3, with `w13_scales` and `w2_scales`, and input scales for static activations.
    """

    w13_scales: Tensor | None
    w2_scales: Tensor | None
    w13_input_scale: Tensor | None
    w2_input_scale: Tensor | None
    trains_in_fp8 = False
    """Where gradients are wanted, plain weights are multiplied in 8-bit floats (see `kernels.fp8_training`)."""

    def __init__(
        self, hidden_size: int, experts: int, columns: int, fp8: tuple[Fp8Matrix, Fp8Matrix] | None = None
    ) -> None:
        super().__init__()
        self.fp8 = fp8
        w13, w2 = (experts, 2 * columns, hidden_size), (experts, hidden_size, columns)
        if fp8 is None:
            self.w13, self.w2 = nn.Parameter(torch.empty(w13)), nn.Parameter(torch.empty(w2))
        else:
            self.activations = fp8[0].activations
            self.w13, self.w13_scales, self.w13_input_scale = fp8[0].parameters(*w13)
            self.w2, self.w2_scales, self.w2_input_scale = fp8[1].parameters(*w2)
        self.prepared: PreparedExperts | None = None

    def prepare(self, dtype: torch.dtype, deterministic: bool) -> None:
        """Keep the weights as inference in `dtype` on a CPU wants them, and only so; on other devices they stay."""
        if self.fp8 is not None:
            self.activations = multiplied_activations(self.activations, self.w13.device)
        if self.w13.device.type == "cpu":
            w13, w2 = (self.w13.detach(), self.w2.detach()) if self.fp8 is None else self.fp8_weights()
            self.prepared = PreparedExperts(w13, w2, dtype, deterministic)
            del self.w13, self.w2
            self.w13_scales = self.w2_scales = None

    def forward(self, x_RD: Tensor, offsets_e: Tensor) -> Tensor:
        if self.fp8 is not None:
            input_scales = self.w13_input_scale, self.w2_input_scale
            return fp8_expert_mlp(x_RD, *self.fp8_weights(), offsets_e, self.activations, input_scales)
        if self.trains_in_fp8 and torch.is_grad_enabled():
            return expert_mlp(x_RD, self.w13, self.w2, offsets_e, fp8=True)
        return expert_mlp(x_RD, self.w13, self.w2, offsets_e)

    def fp8_weights(self) -> tuple[Fp8Weight, Fp8Weight]:
        """w13 and w2 as kernels take them, where they are FP8."""
        assert self.fp8 is not None and self.w13_scales is not None and self.w2_scales is not None
        return self.fp8[0].weight(self.w13, self.w13_scales), self.fp8[1].weight(self.w2, self.w2_scales)


class MoEFeedForward(nn.Module):
    """x + sum over the chosen experts of weight * expert(x)."""

    def __init__(self, config: ModelConfig, layer: int, experts: int, columns: int, first: int = 0) -> None:
        super().__init__()
        assert config.moe is not None
        self.eps, self.num_experts = config.norm_eps, config.moe.num_experts
        self.norm = Weight(config.hidden_size)
        self.router = Router(config.hidden_size, config.moe, layer)
        quantization, aligned = config.fp8(f"layers.{layer}.ffn.experts"), math.gcd(first, columns) % GROUP_ROWS == 0
        w13, w2 = Fp8Matrix.of(quantization, aligned=aligned), Fp8Matrix.of(quantization, first)
        self.experts = Experts(config.hidden_size, experts, columns, None if w13 is None or w2 is None else (w13, w2))

    def forward(self, x_TD: Tensor, rotary: Rotary, context: ForwardContext) -> Tensor:
        u_TD, (weights_TK, experts_TK, kept_TK) = self.router(rms_norm(x_TD, self.norm.weight, self.eps), context)
        return x_TD + context.dispatcher.route(
            self.router.layer,
            u_TD,
            weights_TK,
            experts_TK,
            kept_TK,
            self.num_experts,
            self.experts.prepared or self.experts,
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
