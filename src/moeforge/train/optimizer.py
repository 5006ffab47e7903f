"""The optimiser: parameter groups, float32 master weights, gradient norm and clipping."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, nn

from moeforge.errors import UserError

Precision = Literal["bf16", "bf16_pure", "fp32", "fp64"]

MODEL_DTYPE: dict[str, torch.dtype] = {
    "bf16": torch.bfloat16,
    "bf16_pure": torch.bfloat16,
    "fp32": torch.float32,
    "fp64": torch.float64,
}
_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


def _is_decayed(name: str) -> bool:
    """Matrices decay; norms, biases and the router's scale do not."""
    return not (name.endswith(("norm.weight", "bias")) or name.endswith("router.scale"))


class Optimizer:
    """AdamW or SGD over a model's parameters.

    With `masters` the model's weights are 16-bit copies of float32 masters: gradients are summed in float32 as the
    backward pass produces them, and every step writes the copies anew.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        masters: bool,
        kind: Literal["adamw", "sgd"] = "adamw",
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        expert_lr_scale: float = 1.0,
        clip_norm: float = 0.0,
    ) -> None:
        self.names = [name for name, _ in model.named_parameters()]
        self.weights: list[Tensor] = [parameter for _, parameter in model.named_parameters()]
        self.masters = [w.detach().float() for w in self.weights] if masters else self.weights
        self.clip_norm = clip_norm
        self._uses_masters = masters
        groups: dict[tuple[bool, bool], list[Tensor]] = {}
        for name, master in zip(self.names, self.masters, strict=True):
            groups.setdefault((_is_decayed(name), ".experts." in name), []).append(master)
        settings = [
            {"params": params, "weight_decay": weight_decay * decayed, "scale": expert_lr_scale if expert else 1.0}
            for (decayed, expert), params in groups.items()
        ]
        # The rate is a placeholder: every step sets it from the schedule.
        if kind == "adamw":
            self.torch: torch.optim.Optimizer = torch.optim.AdamW(settings, lr=1.0, betas=betas, eps=eps, fused=True)
        else:
            self.torch = torch.optim.SGD(settings, lr=1.0)
        self._movers = [_MoveGradient(master) for master in self.masters] if masters else []
        for weight, mover in zip(self.weights, self._movers, strict=False):
            weight.register_post_accumulate_grad_hook(mover)

    def step(self, lr: float) -> Tensor:
        """Clip, update, clear the gradients. Returns the gradient norm before clipping."""
        for mover in self._movers:
            mover.finish()
        gradients = [m.grad for m in self.masters if m.grad is not None]
        wide = torch.float64 if gradients[0].dtype == torch.float64 else torch.float32
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g, dtype=wide) for g in gradients]))
        if self.clip_norm > 0:
            factor = (self.clip_norm / norm.clamp_min(1e-12)).clamp_max(1.0)
            if factor.device.type != "cpu" or factor < 1:
                torch._foreach_mul_(gradients, factor)
        for group in self.torch.param_groups:
            group["lr"] = lr * group["scale"]
        self.torch.step()
        if self._uses_masters:
            with torch.no_grad():
                torch._foreach_copy_(self.weights, self.masters)
        else:
            self.torch.zero_grad(set_to_none=True)
        return norm

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of masters and moments, for a checkpoint."""
        for name, master in zip(self.names, self.masters, strict=True):
            if self._uses_masters:
                yield f"master.{name}", master
            for moment, value in self.torch.state.get(master, {}).items():
                if moment in _MOMENTS:
                    yield f"{moment}.{name}", value

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state`; the model's own weights are already loaded. Raises UserError for a missing entry."""
        for name, master in zip(self.names, self.masters, strict=True):
            if self._uses_masters:
                master.copy_(_entry(state, f"master.{name}"))
            if isinstance(self.torch, torch.optim.AdamW):
                self.torch.state[master] = {
                    moment: _entry(state, f"{moment}.{name}").to(master.device) for moment in _MOMENTS
                }


def _entry(state: dict[str, Tensor], key: str) -> Tensor:
    if key not in state:
        raise UserError(f"optimizer state: {key} is missing; resume from another checkpoint")
    return state[key]


class _MoveGradient:
    """Adds a 16-bit gradient to its float32 master's and frees it, as soon as autograd has produced it.

    The float32 buffer lives as long as the run: allocating gigabytes every step costs more than the update itself.
    """

    def __init__(self, master: Tensor) -> None:
        self.master = master
        master.grad = torch.zeros_like(master)
        self.fresh = True

    def __call__(self, weight: Tensor) -> None:
        assert weight.grad is not None and self.master.grad is not None
        if self.fresh:
            self.master.grad.copy_(weight.grad)
            self.fresh = False
        else:
            self.master.grad += weight.grad
        weight.grad = None

    def finish(self) -> None:
        """The step's last gradient is in: the next one starts a new sum (of nothing, if none came)."""
        if self.fresh and self.master.grad is not None:
            self.master.grad.zero_()
        self.fresh = True
