"""Decode steps on a CPU, a token of each sequence, in one call of the native library."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moeforge.kernels import linear, rms_norm
from moeforge.kernels.backend import use_triton
from moeforge.kernels.native_decode import NativeDecode, NativeFFN, NativeLayer
from moeforge.model import Shard, Transformer
from moeforge.model.units import Attention, FeedForward, MoEFeedForward
from moeforge.serve.kv_cache import KVCache
from moeforge.serve.paged_attention import slots
from moeforge.serve.shard import ServingShard
from moeforge.serve.step import StepBatch


class NativeSteps:
    """Steps of one new token a sequence. The bits are those of the model's units, one after another."""

    def __init__(self, model: Transformer, cache: KVCache, layers: list[NativeLayer]) -> None:
        self.model, self.cache = model, cache
        self._decode = NativeDecode(layers, model.config.num_heads, model.config.norm_eps)

    @classmethod
    def of(cls, model: Transformer, cache: KVCache, shard: Shard) -> NativeSteps | None:
        """None for a model that the library does not run whole: of several ranks, with norms of queries and keys or a
        bias behind attention, in other dtypes than bf16, with pages of 8 bits, heads of no multiple of 16, or matrices
        that do not come in panels."""
        config = model.config
        whole = isinstance(shard, ServingShard) and shard.group.size == 1
        plain = config.qk_norm == "none" and not config.output_bias and config.head_dim % 16 == 0
        if not whole or not plain or cache.fp8 or use_triton(cache.layers[0]):
            return None
        units = dict(model.units())
        layers: list[NativeLayer] = []
        for number, pages in enumerate(cache.layers):
            attention, ffn = units[f"layers.{number}.attention"], units[f"layers.{number}.ffn"]
            assert isinstance(attention, Attention) and isinstance(ffn, FeedForward | MoEFeedForward)
            qkv, o, parts = attention.qkv.prepared, attention.o.prepared, _native_ffn(ffn)
            if qkv is None or qkv.native is None or o is None or o.native is None or parts is None:
                return None
            # Views, which keep their storage alive whatever becomes of the parameter.
            norms = attention.norm.weight.detach(), ffn.norm.weight.detach()
            bias = None if attention.qkv.bias is None else attention.qkv.bias.detach()
            window = config.window(number)
            layers.append(NativeLayer(norms[0], qkv.native, bias, o.native, norms[1], parts, pages, window))
        return cls(model, cache, layers)

    def take(self, batch: StepBatch) -> bool:
        """Whether a step is of that kind."""
        sequences = batch.sequences
        return len(sequences) > 0 and all(s.samples and len(s.tokens) == 1 for s in sequences)

    @torch.inference_mode()
    def forward(self, batch: StepBatch) -> Tensor:
        """Logits [R, V] of a step that it takes."""
        model, sequences = self.model, batch.sequences
        widest = max(len(s.block_ids) for s in sequences)
        table_BP = torch.tensor([[*s.block_ids, *[s.block_ids[-1]] * (widest - len(s.block_ids))] for s in sequences])
        tokens, positions, lengths, places = torch.tensor(
            [
                [s.tokens[0] for s in sequences],
                [s.begin for s in sequences],
                [s.end for s in sequences],
                slots(batch, self.cache.block_size),
            ]
        )
        assert model.embed is not None and model.head is not None
        x = F.embedding(tokens, model.embed.weight)
        x = self._decode(x, *model.rotary(positions), places, table_BP, lengths)
        return linear(rms_norm(x, model.head.norm.weight, model.head.eps), model.output_weight)


def _native_ffn(unit: FeedForward | MoEFeedForward) -> NativeFFN | None:
    """What the library takes of a feed-forward, None where it is not prepared for it."""
    if isinstance(unit, MoEFeedForward):
        gate, experts = unit.router.prepared, unit.experts.prepared
        if gate is None or gate.native is None or experts is None or experts.native is None:
            return None
        return gate.native, experts.native
    w13, w2 = unit.w13.prepared, unit.w2.prepared
    if w13 is None or w13.native is None or w2 is None or w2.native is None:
        return None
    return w13.native, w2.native
