"""Seconds of units and stages: what the simulator runs on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import astuple, dataclass


@dataclass(frozen=True)
class UnitTime:
    """Seconds of a unit, or of a stage, on one rank.

    Of one micro-batch: `forward`; `backward`, done as a whole; `backward_input` and `backward_weight`, done apart, as
    zero-bubble schedules want it (Qi et al., 2024); `recompute`, which comes before the backward where activations were
    not kept. Once a step: `update`, the reduction of gradients over replicas included.
    """

    forward: float = 0.0
    backward: float = 0.0
    backward_input: float = 0.0
    backward_weight: float = 0.0
    recompute: float = 0.0
    update: float = 0.0

    def __add__(self, other: UnitTime) -> UnitTime:
        return UnitTime(*(mine + theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True)))


def stage_time(units: Iterable[tuple[UnitTime, bool]], first: bool = False, tied_ends: bool = False) -> UnitTime:
    """The sum over a stage's units, each with whether it is recomputed; the result's `recompute` is 0.

    Where anything is recomputed, and where a tied embedding and head share the stage (`tied_ends`), the backward pass
    runs as a whole even under schedules that split it (see `parallel.pipeline`): `backward_weight` is then 0. The
    `first` stage has no input to find a gradient for, so torch runs its whole backward as that of the weights.
    """
    forward = backward = for_input = for_weight = update = 0.0
    whole = tied_ends
    for unit, again in units:
        forward += unit.forward
        backward += unit.backward + (unit.recompute if again else 0.0)
        for_input += unit.backward_input
        for_weight += unit.backward_weight
        update += unit.update
        whole = whole or again
    if whole:
        for_input, for_weight = backward, 0.0
    elif first:
        for_input, for_weight = 0.0, backward
    return UnitTime(forward, backward, for_input, for_weight, 0.0, update)
