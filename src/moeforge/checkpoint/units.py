"""A forward pass with the weights of one unit in memory at a time, however large the model.

Legend: T tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

import torch
from torch import Tensor, nn

from moeforge.checkpoint.load import in_memory, reader
from moeforge.checkpoint.names import fuse
from moeforge.checkpoint.opened import Checkpoint
from moeforge.model import ForwardContext, Transformer
from moeforge.model.rotary import rotary_angles


class Passage:
    """T tokens on their way through the units: `hidden_TD` is what the last of them returned."""

    def __init__(
        self, model: Transformer, tokens_T: Tensor, positions_T: Tensor, context: ForwardContext, dtype: torch.dtype
    ) -> None:
        self.context = context
        self.hidden_TD = tokens_T  # the embedding takes the tokens where others take hidden states
        self._rotary = rotary_angles(model.config, positions_T, dtype)

    def through(self, unit: nn.Module) -> None:
        """Passes the next unit."""
        self.hidden_TD = unit(self.hidden_TD, self._rotary, self.context)


def empty_model(checkpoint: Checkpoint) -> Transformer:
    """The model without storage, for `loaded_units`."""
    with torch.device("meta"):
        return Transformer(checkpoint.config).eval().requires_grad_(False)


@torch.no_grad()
def loaded_units(
    model: Transformer, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[str, nn.Module]]:
    """(name, unit) of an `empty_model` in forward order, each with its weights until the next one is asked for.

    The embedding of a model that ties it to the head, and the head, keep theirs. Raises UserError for weights that are
    NaN or infinite.
    """
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    weights = groupby(fuse(checkpoint.config, reader(checkpoint, dtype)), lambda weight: _unit_of(weight[0]))
    for (name, unit), (_, group) in zip(model.units(), weights, strict=True):
        state = {
            key.removeprefix(f"{name}."): in_memory(key, weight, shapes[key]).to(device, copy=True)
            for key, weight in group
        }
        unit.load_state_dict(state, assign=True)
        yield name, unit
        if name != "head" and not (name == "embed" and checkpoint.config.tie_embeddings):
            unit.to("meta")


def _unit_of(weight: str) -> str:
    """layers.3.ffn for layers.3.ffn.experts.w2."""
    name = weight.split(".")
    return ".".join(name[:3]) if name[0] == "layers" else name[0]
