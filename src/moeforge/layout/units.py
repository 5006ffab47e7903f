"""The flat list of units, and which of them are recomputed."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence

from moeforge.errors import UserError
from moeforge.layout.shape import ModelShape

ENDS = ("embed", "head")


def unit_names(config: ModelShape) -> tuple[str, ...]:
    """The 2 L + 2 units in the order in which the forward pass runs them: "embed", "layers.i.attention" and
    "layers.i.ffn" for every layer, "head" (final norm and output matrix)."""
    layers = (f"layers.{layer}.{kind}" for layer in range(config.num_layers) for kind in ("attention", "ffn"))
    return ("embed", *layers, "head")


def resolve_recompute(config: ModelShape, choice: str | Sequence[str]) -> tuple[str, ...]:
    """Unit names for "none", "all", "attention", "ffn" or a list of layer units, in forward order.

    Embedding and head are not among them: one keeps nothing worth recomputing, the other is the last to run.
    Raises UserError naming the nearest unit for an unknown one.
    """
    units = tuple(name for name in unit_names(config) if name not in ENDS)
    kinds: dict[str, Callable[[str], bool]] = {
        "none": lambda name: False,
        "all": lambda name: True,
        "attention": lambda name: name.endswith(".attention"),
        "ffn": lambda name: name.endswith(".ffn"),
    }
    if isinstance(choice, str):
        if choice not in kinds:
            allowed = f"{', '.join(kinds)} or a list of units"
            raise UserError(f'model.recompute = "{choice}": must be one of {allowed}')
        return tuple(filter(kinds[choice], units))
    for name in choice:
        if name not in units:
            nearest = difflib.get_close_matches(name, units, 1, cutoff=0)
            hint = f"; did you mean {nearest[0]}?" if nearest else ""
            raise UserError(f'model.recompute = "{name}": not a layer unit of this model{hint}')
    return tuple(name for name in units if name in set(choice))
