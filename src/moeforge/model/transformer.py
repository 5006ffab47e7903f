"""The transformer as a flat list of units."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
from torch import Tensor, nn

from moeforge.config.model import ModelConfig
from moeforge.kernels import PreparedWeight, Weight
from moeforge.kernels.fp8 import E4M3
from moeforge.layout import Layout, unit_names
from moeforge.model.context import ForwardContext
from moeforge.model.recompute import recomputed
from moeforge.model.rotary import rotary_angles
from moeforge.model.router import Router
from moeforge.model.units import Attention, Embedding, Experts, FeedForward, Head, Linear, MoEFeedForward

_RANDOM_E4M3_STD = 100.0
"""Of e4m3 numbers whose bits are random, NaN apart."""


class Transformer(nn.Module):
    """Embedding, L x (attention, feed-forward), norm and head; or the slice of them that a Layout's stage names.

    Parameter names are global (`layers.7.ffn.experts.w13`), whatever slice is built. The slice may be empty. Parameters
    are uninitialised: load them, or call `reset_parameters`. `rank` is the tensor-parallel rank, `expert_rank` the
    number in the expert block.
    """

    def __init__(
        self,
        config: ModelConfig,
        layout: Layout | None = None,
        stage: int = 0,
        rank: int = 0,
        expert_rank: int = 0,
    ) -> None:
        super().__init__()
        layout = layout or Layout.single(config)
        shard, routed, part = layout.ranks[rank], layout.expert_ranks[expert_rank], layout.stages[stage]
        names = unit_names(config)[part.begin_unit : part.end_unit]
        self.config = config
        self.recompute: Collection[str] = frozenset(part.recompute)
        self.embed: Embedding | None = None
        self.head: Head | None = None
        self.layers = nn.ModuleDict()
        self.names = names
        self._units: dict[str, nn.Module] = {}  # found once: a look-up by name takes as long as a small unit's work
        self._prepared_output: PreparedWeight | None = None
        self._angles: tuple[Tensor, Tensor] | None = None  # of all positions

        def size(span: tuple[int, int]) -> int:
            return span[1] - span[0]

        for name in names:
            if name == "embed":
                self.embed = Embedding(config, size(shard.vocab_rows))
                continue
            if name == "head":
                self.head = Head(config, size(shard.vocab_rows))
                continue
            _, number, kind = name.split(".")
            layer = int(number)
            unit: nn.Module
            if kind == "attention":
                groups = shard.kv_groups[layer]
                unit = Attention(config, layer, size(groups), groups[0])
            elif config.is_moe_layer(layer):
                columns = routed.columns[layer]
                unit = MoEFeedForward(config, layer, size(routed.experts[layer]), size(columns), columns[0])
            else:
                columns = shard.ffn_columns[layer]
                unit = FeedForward(config, layer, size(columns), columns[0])
            if number not in self.layers:
                self.layers[number] = nn.ModuleDict()
            self.layers.get_submodule(number).add_module(kind, unit)
        if self.embed is None and self.head is not None and config.tie_embeddings:
            # A copy of the embedding that another stage holds, for the output projection alone.
            self.embed = Embedding(config, size(shard.vocab_rows))

    def units(self) -> Iterator[tuple[str, nn.Module]]:
        """(global name, module) in order."""
        for name in self.names:
            if name not in self._units:
                self._units[name] = self.get_submodule(name)
            yield name, self._units[name]

    @torch.no_grad()
    def reset_parameters(self, std: float = 0.02) -> None:
        """Random weights for training from scratch: normal(0, std), norms 1, biases 0. FP8 ones, whose bits are random,
        have this deviation too."""
        for name, parameter in self.named_parameters():
            if parameter.dtype == E4M3:
                _fill_e4m3(parameter)
            elif name.endswith("scales"):
                nn.init.constant_(parameter, std / _RANDOM_E4M3_STD)
            elif name.endswith("input_scale") or "norm.weight" in name:
                nn.init.ones_(parameter)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter, std=std)
        for module in self.modules():
            if isinstance(module, Router):
                module.reset_parameters(std)

    @torch.no_grad()
    def prepare(self, positions: int, deterministic: bool = False) -> Transformer:
        """For inference alone, up to so many positions: keep weights as matmuls of few rows want them. Returns itself.

        `deterministic`: a token's bits do not depend on how many others are computed with it.
        """
        first = next(self.parameters())
        self._angles = rotary_angles(self.config, torch.arange(positions, device=first.device), first.dtype)
        for module in self.modules():
            if isinstance(module, (Linear, Experts, Router)):
                module.prepare(first.dtype, deterministic)
        if self.head is not None:
            weight = self.output_weight
            assert isinstance(weight, Tensor)
            self._prepared_output = PreparedWeight(weight.detach(), first.dtype, deterministic)
            self.head.weight = None
        return self.eval().requires_grad_(False)

    def forward(
        self, tokens_T: Tensor, positions_T: Tensor, context: ForwardContext, hidden_tD: Tensor | None = None
    ) -> Tensor:
        """hidden_tD of flat tokens, the rank's share of them; `logits` and `loss` take it further.

        tokens_T and positions_T int64 [T] of the whole micro-batch; hidden_tD is what the previous stage returned, None
        on the first. Empty stages before the embedding pass zeros, which it adds: so gradients find their way back.
        """
        if not self.names:
            assert hidden_tD is not None
            return hidden_tD.clone()
        rotary = self.rotary(positions_T)
        x = hidden_tD
        for name, unit in self.units():
            if name == "embed":
                x = unit(tokens_T, rotary, context)
                x = x if hidden_tD is None else x + hidden_tD
            elif name in self.recompute and torch.is_grad_enabled():
                x = recomputed(unit, x, rotary, context)
            else:
                x = unit(x, rotary, context)
        assert x is not None
        # Pipeline schedules detach what a stage returns in place, which a view cannot bear.
        return x.clone() if x._is_view() else x

    def rotary(self, positions_T: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin of the positions, as `rotary_angles` gives them."""
        if self._angles is None:
            return rotary_angles(self.config, positions_T, next(self.parameters()).dtype)
        cos, sin = self._angles
        return cos[positions_T], sin[positions_T]

    @property
    def output_weight(self) -> Weight:
        """The head's projection [V, D]: its own, or the embedding's where tied."""
        if self._prepared_output is not None:
            return self._prepared_output
        if self.head is not None and self.head.weight is not None:
            return self.head.weight
        assert self.embed is not None
        return self.embed.weight

    def logits(self, hidden_RD: Tensor, context: ForwardContext) -> Tensor:
        """Logits [R, V] of the chosen rows of hidden."""
        return context.shard.logits(hidden_RD, self.output_weight)

    def loss(self, hidden_TD: Tensor, targets_T: Tensor, context: ForwardContext) -> Tensor:
        """Sum of the tokens' cross-entropies (float32); targets of -100 count nothing."""
        weight = self.output_weight
        assert isinstance(weight, Tensor), "a prepared model has no loss"
        return context.shard.cross_entropy(hidden_TD, weight, targets_T)


def _fill_e4m3(values: Tensor) -> None:
    """Random bits, in pieces that need no memory to speak of; the two patterns of NaN, 7F and FF, are left out."""
    for bits in values.view(torch.uint8).flatten().split(1 << 26):
        bits.random_(0, 254)
        bits += bits >= 127
