"""Training of an expert layer on a GPU against transformers, which is skipped where it is not installed."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moeforge.bench.expert_training import plain
from moeforge.bench.gpu_layer import ROUNDS, Layer, random, routing
from moeforge.bench.kernels_timing import in_turn, ratio, that_run
from moeforge.kernels import expert_mlp
from moeforge.model import DenseAttention, ForwardContext, LocalDispatcher
from moeforge.model.units import MoEFeedForward


def experts(layer: Layer, device: torch.device) -> dict[str, Any]:
    """Routed tokens to their experts and back, forward and backward, against the way of transformers.

    "grouped_mm" is that way in plain torch (sort, gather, `F.grouped_mm`, weigh, add), "fp8" our switch for training.
    """
    w13 = (random(device, layer.experts, 2 * layer.ffn, layer.hidden) / layer.hidden**0.5).requires_grad_()
    w2 = (random(device, layer.experts, layer.hidden, layer.ffn) / layer.ffn**0.5).requires_grad_()
    x = random(device, layer.tokens, layer.hidden).requires_grad_()
    weights, chosen = routing(layer, layer.tokens, device)
    weights.requires_grad_()
    route = partial(LocalDispatcher().route, 0, x, weights, chosen, None, layer.experts)
    forward: dict[str, Callable[[], Tensor]] = {
        "moeforge": lambda: route(lambda rows, offsets: expert_mlp(rows, w13, w2, offsets)),
        "fp8": lambda: route(lambda rows, offsets: expert_mlp(rows, w13, w2, offsets, fp8=True)),
        "grouped_mm": lambda: _plain_routed(x, weights, chosen, w13, w2),
    }
    peer, skipped = _mixtral(layer)
    if peer is not None:
        peer.experts.gate_up_proj, peer.experts.down_proj = nn.Parameter(w13.detach()), nn.Parameter(w2.detach())
        forward["transformers"] = lambda: peer.experts(x, chosen, weights)
    inputs = [x, weights, w13, w2, *(() if peer is None else peer.experts.parameters())]
    return _training(forward, inputs, 3 * layer.flops, device) | skipped


def _training(
    forward: dict[str, Callable[[], Tensor]], inputs: list[Tensor], flops: float, device: torch.device
) -> dict[str, Any]:
    """Forward with backward: ms, TFLOP/s and the others' time over ours."""
    with torch.no_grad():
        grad = torch.randn_like(forward["moeforge"]())

    def step(call: Callable[[], Tensor]) -> object:
        return torch.autograd.grad(call(), inputs, grad, allow_unused=True)

    able, failed = that_run({side: partial(step, call) for side, call in forward.items()}, "moeforge")
    found = in_turn(able, ROUNDS, device)
    return {
        "forward_backward_ms": {side: 1e3 * statistics.median(seconds) for side, seconds in found.items()},
        "tflops": {side: flops / statistics.median(seconds) / 1e12 for side, seconds in found.items()},
        "speedup_over": {side: ratio(found, side, "moeforge") for side in found if side != "moeforge"},
        "failed": failed,
    }


def _plain_routed(x_TD: Tensor, weights_TK: Tensor, experts_TK: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
    order = experts_TK.flatten().argsort(stable=True)
    counts = torch.zeros(len(w13), dtype=torch.int64, device=x_TD.device)
    counts.scatter_add_(0, experts_TK.flatten(), torch.ones_like(order))
    y = plain(x_TD[order // experts_TK.shape[1]], w13, w2, counts.cumsum(0).to(torch.int32))
    y = (y * weights_TK.flatten()[order, None].to(y.dtype))[order.argsort()]
    return y.view(*experts_TK.shape, -1).sum(1)


def _mixtral(layer: Layer) -> tuple[Any, dict[str, Any]]:
    """transformers' Mixtral block without weights, or None and why not."""
    try:
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
    except ImportError as error:
        return None, {"transformers_skipped": f"{type(error).__name__}: {error}"}
    config = MixtralConfig(
        hidden_size=layer.hidden, intermediate_size=layer.ffn, num_local_experts=layer.experts,
        num_experts_per_tok=layer.top_k, experts_implementation="grouped_mm",
    )  # fmt: skip
    with torch.device("meta"):
        return MixtralSparseMoeBlock(config), {}


def block(layer: Layer, device: torch.device) -> dict[str, Any]:
    """The whole routed feed-forward, norm and residual included, against transformers' Mixtral block on equal weights.

    `routing_share`: gate, sorting, gathering and combining alone, as a share of the forward pass.
    """
    with device:
        ours = MoEFeedForward(layer.config(), 0, layer.experts, layer.ffn).bfloat16()
    context = ForwardContext(DenseAttention(1, layer.tokens))
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            torch.nn.init.ones_(parameter) if "norm" in name else torch.nn.init.normal_(parameter, std=0.02)
    x, rotary = random(device, layer.tokens, layer.hidden).requires_grad_(), (torch.empty(0), torch.empty(0))
    forward: dict[str, Callable[[], Tensor]] = {"moeforge": lambda: ours(x, rotary, context)}
    peer, result = _mixtral(layer)
    if peer is not None:
        peer.gate.weight = nn.Parameter(ours.router.weight.detach())
        peer.experts.gate_up_proj = nn.Parameter(ours.experts.w13.detach())
        peer.experts.down_proj = nn.Parameter(ours.experts.w2.detach())
        norm = nn.Parameter(ours.norm.weight.detach())
        forward["transformers"] = lambda: x + peer(F.rms_norm(x, x.shape[1:], norm, ours.eps)[None])[0]
    inputs = [x, *ours.parameters()] + ([] if peer is None else [norm, *peer.parameters()])
    result |= _training(forward, inputs, 3 * layer.flops, device)
    forward, _ = that_run(forward, "moeforge")
    if "transformers" in forward:
        with torch.no_grad():
            y, expected = forward["moeforge"]().float(), forward["transformers"]().float()
        result["difference"] = float((y - expected).norm() / expected.norm())

    def route() -> Tensor:
        u, (weights, chosen, _) = ours.router(x, context)
        return context.dispatcher.route(0, u, weights, chosen, None, layer.experts, lambda rows, offsets: rows)

    with torch.no_grad():
        found = in_turn(forward | {"routing": route}, ROUNDS, device)
    result["forward_ms"] = {side: 1e3 * statistics.median(seconds) for side, seconds in found.items()}
    result["forward_speedup_over"] = {"transformers": ratio(found, "transformers", "moeforge")}
    result["routing_share"] = ratio(found, "routing", "moeforge")
    return result
