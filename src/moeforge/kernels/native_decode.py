"""A decode step in one call of the native CPU library: a token of each sequence through all layers of a model.

What a layer does one by one costs its calls through Python as much time as one token's arithmetic. The library does the
same, in the same order, so the bits are the same too.

Legend: T tokens, one of each sequence, D hidden, G KV groups, h head dimension, S positions of a page, P pages.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moeforge.kernels import native
from moeforge.kernels.native import AttentionStruct, GateStruct, NativeExperts, NativeGate, NativeWeight, WeightStruct

_pointer, _long = ctypes.c_void_p, ctypes.c_int64


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, _pointer) for name in ("attention_norm", "ffn_norm")),
        *((name, ctypes.POINTER(WeightStruct)) for name in ("qkv", "o")),
        ("qkv_bias", _pointer),
        ("gate", ctypes.POINTER(GateStruct)),
        *((name, ctypes.POINTER(WeightStruct)) for name in ("w13", "w2")),
        ("attention", AttentionStruct),
    ]


class _Step(ctypes.Structure):
    _fields_ = [
        *((name, _pointer) for name in ("cos", "sin", "slots", "table", "lengths")),
        *((name, _long) for name in ("table_width", "tokens")),
    ]


NativeFFN = tuple[NativeWeight, NativeWeight] | tuple[NativeGate, NativeExperts]
"""w13 [2F, D] and w2 [D, F] of a dense feed-forward, or a gate and its experts."""


@dataclass(frozen=True)
class NativeLayer:
    """A layer: norms bf16 [D], q/k/v fused by KV group and turned by rotary angles, o without bias; `pages` bf16
    [2, P, S, G, h]."""

    attention_norm: Tensor
    qkv: NativeWeight
    qkv_bias: Tensor | None
    o: NativeWeight
    ffn_norm: Tensor
    ffn: NativeFFN
    pages: Tensor
    window: int | None


class NativeDecode:
    """The layers of a model of `heads` query heads, in order."""

    def __init__(self, layers: Sequence[NativeLayer], heads: int, eps: float) -> None:
        self._held, self._eps = tuple(layers), eps
        self._layers = (_Layer * len(layers))(*(_layer(layer, heads) for layer in layers))

    def __call__(
        self, x_TD: Tensor, cos: Tensor, sin: Tensor, slots_T: Tensor, table_TP: Tensor, length_T: Tensor
    ) -> Tensor:
        """Replaces the hidden states bf16 [T, D] before the first layer by those after the last, and returns them; keys
        and values are in the pages afterwards. cos and sin bf16 [T, 1, h/2], the rest int64: slot = page * S + position
        in the page, pages of each sequence filled up with any, and its positions with the new one."""
        first, tensors = self._held[0], (cos, sin, slots_T, table_TP, length_T)
        assert x_TD.shape[1] == first.qkv.inputs
        assert cos.shape == sin.shape == (len(x_TD), 1, first.pages.shape[-1] // 2)
        assert all(len(x) == len(x_TD) for x in tensors) and all(x.is_contiguous() for x in (x_TD, *tensors))
        assert all(x.dtype == torch.bfloat16 for x in (x_TD, cos, sin))
        assert all(x.dtype == torch.int64 for x in tensors[2:])
        step = _Step(*(x.data_ptr() for x in tensors), table_TP.shape[1], len(x_TD))
        arguments = ctypes.addressof(self._layers), len(self._layers), ctypes.addressof(step), self._eps
        library = native.library()
        assert library is not None
        library.moeforge_decode(*arguments, x_TD.data_ptr(), torch.get_num_threads())
        return x_TD


def _layer(layer: NativeLayer, heads: int) -> _Layer:
    given = [x for x in (layer.attention_norm, layer.ffn_norm, layer.qkv_bias, layer.pages) if x is not None]
    assert all(x.dtype == torch.bfloat16 and x.is_contiguous() for x in given)
    first, second = layer.ffn
    if isinstance(first, NativeGate):
        assert isinstance(second, NativeExperts)
        gate, w13, w2 = ctypes.pointer(first.struct), second.w13, second.w2
    else:
        assert isinstance(second, NativeWeight)
        gate, w13, w2 = None, (WeightStruct * 1)(first.struct), (WeightStruct * 1)(second.struct)
    return _Layer(
        layer.attention_norm.data_ptr(),
        layer.ffn_norm.data_ptr(),
        ctypes.pointer(layer.qkv.struct),
        ctypes.pointer(layer.o.struct),
        None if layer.qkv_bias is None else layer.qkv_bias.data_ptr(),
        gate,
        ctypes.cast(w13, ctypes.POINTER(WeightStruct)),
        ctypes.cast(w2, ctypes.POINTER(WeightStruct)),
        native.attention_struct(layer.pages, heads, layer.window),
    )
