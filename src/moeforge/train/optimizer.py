"""The optimiser: parameter groups, float32 master weights, gradient norm and clipping, over the elements a rank
owns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from moeforge.parallel import Mesh
from moeforge.parallel.parameters import ParameterPart, StateEntry, wide_dtype
from moeforge.parallel.zero import Zero

Precision = Literal["bf16", "bf16_pure", "fp32", "fp64"]

MODEL_DTYPE: dict[str, torch.dtype] = {
    "bf16": torch.bfloat16,
    "bf16_pure": torch.bfloat16,
    "fp32": torch.float32,
    "fp64": torch.float64,
}
_MOMENTS = ("exp_avg", "exp_avg_sq")


def _is_decayed(name: str) -> bool:
    """Matrices decay; norms, biases and the router's scale do not."""
    return not (name.endswith(("norm.weight", "bias")) or name.endswith("router.scale"))


class Optimizer:
    """AdamW or SGD over a rank's parameters.

    With `masters` the model's weights are 16-bit copies of float32 masters: gradients are summed in float32 as the
    backward pass produces them, and every step writes the copies anew. `parts` and `mesh` say which elements this rank
    owns (`Zero`): it keeps masters and moments of those alone. In one process it owns everything.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        parts: Mapping[str, ParameterPart],
        mesh: Mesh,
        *,
        zero: bool = True,
        masters: bool,
        kind: Literal["adamw", "sgd"] = "adamw",
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        expert_lr_scale: float = 1.0,
        clip_norm: float = 0.0,
    ) -> None:
        self.parts, self.clip_norm = parts, clip_norm
        self.weights: dict[str, Tensor] = dict(parameters)
        self.zero = Zero(parts, mesh, zero)
        self._uses_masters = masters
        self.owned: dict[str, Tensor] = {}
        for name, weight in self.weights.items():
            begin, end = self.zero.owned(name)
            own = weight.detach().view(-1)[begin:end]
            self.owned[name] = own.float() if masters else own
        groups: dict[tuple[bool, bool], list[Tensor]] = {}
        for name, own in self.owned.items():
            if own.numel():
                groups.setdefault((_is_decayed(name), ".experts." in name), []).append(own)
        settings = [
            {"params": params, "weight_decay": weight_decay * decayed, "scale": expert_lr_scale if expert else 1.0}
            for (decayed, expert), params in groups.items()
        ] or [{"params": [], "weight_decay": 0.0, "scale": 1.0}]  # an empty stage
        # The rate is a placeholder: every step sets it from the schedule.
        if kind == "adamw":
            self.torch: torch.optim.Optimizer = torch.optim.AdamW(settings, lr=1.0, betas=betas, eps=eps, fused=True)
        else:
            self.torch = torch.optim.SGD(settings, lr=1.0)
        self._movers = {name: _MoveGradient(weight) for name, weight in self.weights.items()} if masters else {}
        for name, mover in self._movers.items():
            parameters[name].register_post_accumulate_grad_hook(mover)

    def collect(self) -> None:
        """Move 16-bit gradients into their float32 sums where no hook has done it: split-backward pipeline schedules
        assign them past autograd's hooks."""
        for name, mover in self._movers.items():
            if self.weights[name].grad is not None:
                mover(self.weights[name])

    def step(self, lr: float) -> Tensor:
        """Sum over ranks, clip, update, clear the gradients. Returns the gradient norm before clipping."""
        self.collect()
        reduced = self.zero.reduce(self._full_gradients(), self._wide())
        gradients = {name: reduced[name] for name in self.weights}  # the order that the norm is summed in
        norm = self.zero.norm(gradients)
        for name, own in self.owned.items():
            own.grad = gradients[name].to(own.dtype)
        mine = [own.grad for own in self.owned.values() if own.grad is not None]
        if self.clip_norm > 0 and mine:  # a rank with empty stages has nothing to clip
            factor = (self.clip_norm / norm.clamp_min(1e-12)).clamp_max(1.0)
            if factor.device.type != "cpu" or factor < 1:
                torch._foreach_mul_(mine, factor)
        for group in self.torch.param_groups:
            group["lr"] = lr * group["scale"]
        self.torch.step()
        for own in self.owned.values():
            own.grad = None
        if not self._uses_masters:
            for weight in self.weights.values():
                weight.grad = None
        self._publish()
        return norm

    def _full_gradients(self) -> dict[str, Tensor]:
        if self._uses_masters:
            return {name: mover.finish() for name, mover in self._movers.items()}
        return {name: torch.zeros_like(w) if w.grad is None else w.grad for name, w in self.weights.items()}

    def _wide(self) -> torch.dtype:
        return wide_dtype(next(iter(self.weights.values())).dtype) if self.weights else torch.float32

    @torch.no_grad()
    def _publish(self) -> None:
        """The weights from the owned elements of all ranks. In one process without masters they are the same
        storage."""
        if self._uses_masters or self.zero.mesh.world.size > 1:
            self.zero.gather(self.owned, self.weights)

    def entries(self) -> list[StateEntry]:
        """Masters (or weights) and moments for a checkpoint: live storage, to be read or to be filled before
        `restore`."""
        found = []
        for name, own in self.owned.items():
            tensors = {"weight": own}
            if isinstance(self.torch, torch.optim.AdamW) and own.numel():
                tensors |= {moment: self._state(own)[moment] for moment in _MOMENTS}
            begin, end = self.zero.owned(name)
            saved = self.zero.counts(name)
            for key, tensor in tensors.items():
                found.append(StateEntry(f"{key}.{name}", self.parts[name], begin, end, tensor, saved))
        return found

    def _state(self, own: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.torch.state[own]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=own.device)
            state |= {moment: torch.zeros_like(own) for moment in _MOMENTS}
        return state

    @torch.no_grad()
    def restore(self, step: int) -> None:
        """Go on after `step` optimiser steps from what was loaded into the `entries`."""
        if isinstance(self.torch, torch.optim.AdamW):
            for own in self.owned.values():
                if own.numel():
                    self._state(own)["step"].fill_(step)
        self._publish()


class _MoveGradient:
    """Adds a 16-bit gradient to a float32 sum and frees it, as soon as autograd has produced it.

    The float32 buffer lives as long as the run: allocating gigabytes every step costs more than the update itself.
    """

    def __init__(self, weight: Tensor) -> None:
        self.total = torch.zeros_like(weight, dtype=torch.float32)
        self.fresh = True

    def __call__(self, weight: Tensor) -> None:
        assert weight.grad is not None
        if self.fresh:
            self.total.copy_(weight.grad)
            self.fresh = False
        else:
            self.total += weight.grad
        weight.grad = None

    def finish(self) -> Tensor:
        """The step's sum (of nothing, if no gradient came); the next gradient starts a new one."""
        if self.fresh:
            self.total.zero_()
        self.fresh = True
        return self.total
