"""The router: gate logits, the choice of experts, capacity, auxiliary loss and statistics."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moeforge.config.model import MoEConfig
from moeforge.kernels import PreparedGate, gate, router_logits
from moeforge.kernels.precision import widen
from moeforge.model.context import ForwardContext, RoutingGroups
from moeforge.model.record import AuxLoss


class Routing(NamedTuple):
    """weights_TK and experts_TK of the chosen experts; `kept_TK` None when every assignment travels."""

    weights_TK: Tensor
    experts_TK: Tensor
    kept_TK: Tensor | None


class Decisions(NamedTuple):
    """What the gate found for all T tokens: probabilities [T, E], normalised and raw logits [T, E], experts [T, K]."""

    probabilities: Tensor
    logits: Tensor
    raw: Tensor
    experts: Tensor


class _AttachLoss(torch.autograd.Function):
    """Identity on an activation that sends `coefficient` as the gradient of a side loss.

    So the auxiliary loss trains under any pipeline schedule and never enters the reported loss.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor, coefficient: Tensor) -> Tensor:
        ctx.save_for_backward(coefficient.to(loss.dtype))
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        return grads[0], ctx.saved_tensors[0], None


def _choices(experts_TK: Tensor, num_experts: int, groups: RoutingGroups) -> Tensor:
    """Which expert each of a group's assignments, in token order, goes to: bool [n, E, T * K / n]; padding to none.

    Assignments lie side by side, so that GPUs count and scan them fast.
    """
    experts = experts_TK.reshape(groups.count, 1, -1)
    chosen = experts == torch.arange(num_experts, device=experts.device).unsqueeze(1)
    if groups.valid_T is not None:
        chosen &= groups.valid_T[:, None].expand_as(experts_TK).reshape(experts.shape)
    return chosen


def group_load(experts_TK: Tensor, num_experts: int, groups: RoutingGroups) -> Tensor:
    """Assignments per group and expert, int64 [n, E]; padding is not counted."""
    return _choices(experts_TK, num_experts, groups).sum(2, dtype=torch.int32).long()


def group_rank(experts_TK: Tensor, num_experts: int, groups: RoutingGroups) -> Tensor:
    """How many assignments of its group come before each one at the same expert, int64 [T, K] (token order).

    Padding is not counted; its own rank is meaningless.
    """
    running = _choices(experts_TK, num_experts, groups).cumsum(2, dtype=torch.int32)
    return running.gather(1, experts_TK.reshape(groups.count, 1, -1)).view(experts_TK.shape).long() - 1


def capacity(assignments: Tensor, num_experts: int, factor: float) -> Tensor:
    """C = ceil(factor * N / E), elementwise over groups; float64."""
    return torch.ceil(assignments.double() * factor / num_experts)


def auxiliary_loss(kind: AuxLoss, probability_nE: Tensor, load_nE: Tensor) -> Tensor:
    """Balance loss of each routing group (or sequence), [n]; no coefficient.

    `probability_nE` is the mean gate probability, differentiable; `load_nE` counts. "skywork" is sum_j (1/E - P_j)^2
    (Skywork-MoE equation 4); "switch", "sequence" and "global" are E * sum_j f_j P_j (Switch Transformer
    equation 4), which differ in what f is counted over. At equal coefficient and f near P the first one's gradient is
    E/2 times smaller.
    """
    num_experts = probability_nE.shape[1]
    if kind == "skywork":
        return (probability_nE - 1.0 / num_experts).square().sum(1)
    share = load_nE / load_nE.sum(1, keepdim=True).clamp_min(1).to(probability_nE.dtype)
    return num_experts * (share * probability_nE).sum(1)


class Router(nn.Module):
    """z = W x (+ b) in float32, normalised where configured, softmax, top-k."""

    def __init__(self, hidden_size: int, moe: MoEConfig, layer: int) -> None:
        super().__init__()
        self.moe, self.layer = moe, layer
        self.weight = nn.Parameter(torch.empty(moe.num_experts, hidden_size))
        self.bias = nn.Parameter(torch.empty(moe.num_experts)) if moe.router_bias else None
        self.scale = nn.Parameter(torch.empty(())) if moe.gate_norm_learned else None
        self.prepared: PreparedGate | None = None

    def reset_parameters(self, std: float) -> None:
        """Normal weights: zeros would send every token to the same experts with nothing to tell them apart."""
        nn.init.normal_(self.weight, std=std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        if self.scale is not None:
            nn.init.constant_(self.scale, self.moe.gate_norm or 1.0)

    def prepare(self, dtype: torch.dtype, deterministic: bool) -> None:
        """Keep the weight as inference on activations of `dtype` wants it, and only so."""
        scale = self.moe.gate_norm if self.scale is None else float(self.scale)
        self.prepared = PreparedGate(
            self.weight.detach(), self.bias, self.moe.top_k, scale, self.moe.renormalize, dtype, deterministic
        )
        del self.weight

    def forward(self, x_tD: Tensor, context: ForwardContext) -> tuple[Tensor, Routing]:
        """Returns x_tD (carrying the auxiliary loss's gradient) and the routing of its tokens.

        The gate sees a rank's own tokens; capacity, balance and statistics those of whole routing groups.
        """
        if self.prepared is not None:
            return x_tD, Routing(*self.prepared(x_tD), None)
        raw_tE = router_logits(x_tD, self.weight, self.bias)
        scale: float | Tensor | None = self.moe.gate_norm if self.scale is None else widen(self.scale)
        own = gate(raw_tE, self.moe.top_k, scale, self.moe.renormalize)
        groups = context.groups
        if groups is None:
            return x_tD, Routing(own.weights, own.experts, None)

        shard = context.shard
        chosen = Decisions(*shard.gather_tokens(own.probabilities, own.logits.detach(), raw_tE.detach(), own.experts))
        kept = None if groups.valid_T is None else groups.valid_T[:, None].expand_as(chosen.experts)
        load_nE = group_load(chosen.experts, self.moe.num_experts, groups)
        assignments_n = load_nE.sum(1)
        capacity_n = capacity(assignments_n, self.moe.num_experts, groups.capacity_factor)
        if groups.drop:
            rank_TK = group_rank(chosen.experts, self.moe.num_experts, groups)
            within = rank_TK.view(groups.count, -1) < capacity_n[:, None]
            kept = within.view_as(rank_TK) if kept is None else within.view_as(rank_TK) & kept
        if context.record is not None:
            overflow = (load_nE - capacity_n[:, None]).clamp_min(0).sum()
            x_tD = self._account(x_tD, chosen, load_nE, overflow, context)
        return x_tD, Routing(own.weights, own.experts, shard.own_kept(kept, own.experts))

    def _account(
        self, x_tD: Tensor, chosen: Decisions, load_nE: Tensor, overflow: Tensor, context: ForwardContext
    ) -> Tensor:
        """Attach the auxiliary loss and assign this micro-batch's statistics to the record."""
        record, groups = context.record, context.groups
        assert record is not None and groups is not None
        e, k = self.moe.num_experts, self.moe.top_k
        raw_TE = chosen.raw
        valid = torch.ones_like(raw_TE[:, 0]) if groups.valid_T is None else groups.valid_T.to(raw_TE.dtype)
        load = load_nE.sum(0).double()
        if record.aux_loss == "sequence" and groups.sequences not in (None, groups.count):
            groups = replace(groups, count=groups.sequences)
            load_nE = group_load(chosen.experts, e, groups)
        tokens_n = valid.view(groups.count, -1).sum(1)
        probability_nE = (chosen.probabilities * valid[:, None]).view(groups.count, -1, e).sum(1)
        aux = tokens_n.new_zeros(())
        if record.aux_loss != "none":
            if record.aux_loss == "global":
                # The running load of the step so far; the later micro-batches see the most of it.
                so_far = record.load_before(self.layer, context.micro_batch) + load
                load_nE = context.shard.reduce_statistics(so_far).expand(groups.count, e)
            mean_nE = probability_nE / tokens_n.clamp_min(1)[:, None]
            aux = (auxiliary_loss(record.aux_loss, mean_nE, load_nE) * tokens_n).sum()
            x_tD = _AttachLoss.apply(x_tD, aux, record.alpha_of(self.layer) / record.routed_tokens)
        with torch.no_grad():
            top = torch.topk(chosen.logits, min(3, e), dim=1).values
            # Capped below float32's overflow: unnormalised logits may lie further apart, and inf * 0 is NaN.
            ratio = (top[:, :-1] - top[:, 1:]).clamp_max(80.0).exp() * valid[:, None]
            p = chosen.probabilities
            scalars = {
                "tokens": tokens_n.sum(),
                "assignments": tokens_n.sum() * k,
                "overflow": overflow,
                "aux": aux,
                "entropy": (torch.special.entr(p).sum(1) * valid).sum(),
                "max1_over_max2": ratio[:, 0].sum() if e > 1 else aux.new_zeros(()),
                "max2_over_max3": ratio[:, 1].sum() if e > 2 else aux.new_zeros(()),
            }
            vectors = [load, probability_nE.sum(0).double()]
            if record.distributions:
                for q in (p, raw_TE.softmax(-1)):
                    vectors.append((q.sort(-1, descending=True).values * valid[:, None]).sum(0).double())
            record.assign(self.layer, context.micro_batch, scalars, *vectors)
        return x_tD
