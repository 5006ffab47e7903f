"""The native CPU library (csrc/): bf16 and e4m3 weights in panels, and what a decode step does around them.

It is there where a compiler was at installation and `MOEFORGE_NATIVE` is not 0; without it, torch does the same. Every
function takes bf16 tensors on the CPU and returns new ones; a row's bits depend on nothing but the row.

Legend: T tokens, D hidden, E experts, K top-k, H heads, G KV groups, h head dimension, B sequences, P pages, S
positions of a page, N outputs.
"""

from __future__ import annotations

import ctypes
import math
import os
import sysconfig
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from moeforge.kernels.arena import long_lived

PANEL = 16
"""Outputs that are computed together."""
BLOCK = 128
"""Inputs that share a scale."""
_int, _long, _float, _pointer = ctypes.c_int, ctypes.c_int64, ctypes.c_float, ctypes.c_void_p


class WeightStruct(ctypes.Structure):
    _fields_ = [("data", _pointer), ("scales", _pointer)] + [
        (name, _long) for name in ("outputs", "inputs", "blocks", "first_block", "scale_width")
    ]


class GateStruct(ctypes.Structure):
    _fields_ = [
        *((name, _pointer) for name in ("weight", "bias")),
        *((name, _long) for name in ("experts", "hidden", "top_k")),
        ("scale", _float),
        ("renormalize", _int),
    ]


class AttentionStruct(ctypes.Structure):
    _fields_ = [
        *((name, _pointer) for name in ("keys", "values")),
        *((name, _long) for name in ("page_size", "groups", "heads_per_group", "head_dim", "table_width", "window")),
        ("scale", _float),
        ("e4m3", _int),
    ]


_ARGUMENTS = {
    "use": [ctypes.c_char_p],
    "pack_bf16": [_pointer, _long, _long, _int, _pointer, _int],
    "pack_e4m3": [_pointer, _long, _long, _int, _pointer, _int],
    "linear": [_pointer, _pointer, _long, _pointer, _pointer, _int],
    "experts": [_pointer, _pointer, _long, _pointer, _long, _long, _pointer, _pointer, _pointer, _int],
    "choose": [_pointer, _pointer, _long, _pointer, _pointer, _int],
    "rms_norm": [_pointer, _pointer, _long, _long, _float, _pointer, _int],
    "swiglu": [_pointer, _long, _long, _pointer, _int],
    "swiglu_backward": [_pointer, _pointer, _long, _long, _pointer, _pointer, _int],
    "split_qkv": [*[_pointer] * 3, *[_long] * 4, *[_pointer] * 3, _int],
    "write": [_pointer, _pointer, _pointer, _long, _long, _pointer, _pointer],
    "decode": [_pointer, _long, _pointer, _float, _pointer, _int],
    "attend": [_pointer, _pointer, _pointer, _pointer, _long, _pointer, _int],
}


_ABI = 2
"""That of csrc/library.cpp."""


def built() -> Path | None:
    """Where the library is, if it was built for this interpreter."""
    path = Path(__file__).with_name(f"_native{sysconfig.get_config_var('EXT_SUFFIX')}")
    return path if path.exists() else None


@cache
def library() -> ctypes.CDLL | None:
    """The library, None where it was not built, is of another version than this file, or is not wanted."""
    path = built()
    if path is None or os.environ.get("MOEFORGE_NATIVE") == "0":
        return None
    try:
        # torch is imported, so its OpenMP library is there for this one to use.
        loaded = ctypes.CDLL(str(path))
        if loaded.moeforge_abi() != _ABI:
            return None
        for name, arguments in _ARGUMENTS.items():
            getattr(loaded, f"moeforge_{name}").argtypes = arguments
    except (OSError, AttributeError):  # of another processor, C library or version than it was built for
        return None
    loaded.moeforge_name.restype = ctypes.c_char_p
    return loaded


def name() -> str | None:
    """The instruction set in use (avx512, avx2, portable); None without the library."""
    loaded = library()
    return None if loaded is None else loaded.moeforge_name().decode()


def takes(*tensors: Tensor) -> bool:
    """Whether the library computes with such activations, and what goes with them."""
    return (
        all(x.dtype == torch.bfloat16 and x.is_cpu for x in tensors)
        and not torch.is_grad_enabled()
        and library() is not None
    )


def _library() -> ctypes.CDLL:
    loaded = library()
    assert loaded is not None
    return loaded


class NativeWeight:
    """A weight [N, K] of bf16 or, with scales, e4m3, in pairs of panels; a copy, the given one may be freed.

    scales float32 [n, k] and `column_offset` as in `Fp8Weight`: for each output or PANEL of them, one, or each block of
    BLOCK inputs. K must be even; with scales it and the offset multiples of 4. `gated`: as `NativeExperts` wants w13,
    no linear map; N is then a multiple of 2 PANEL.
    """

    def __init__(
        self, weight: Tensor, scales: Tensor | None = None, column_offset: int = 0, gated: bool = False
    ) -> None:
        outputs, inputs = weight.shape
        self.outputs, self.inputs = outputs, inputs
        padded = -(-outputs // (2 * PANEL)) * 2 * PANEL
        weight = weight.contiguous()
        self._data = long_lived(padded * inputs, weight.dtype)
        pack = _library().moeforge_pack_bf16 if scales is None else _library().moeforge_pack_e4m3
        pack(weight.data_ptr(), outputs, inputs, gated, self._data.data_ptr(), torch.get_num_threads())
        self._scales: Tensor | None = None
        blocks = width = 1
        if scales is not None:
            blocks = scales.shape[1]
            width = PANEL if scales.shape[0] == outputs else 1
            order = torch.arange(padded // PANEL * width)
            if gated:
                order = order.view(2, -1, width).transpose(0, 1).flatten()
            by_row = scales.float()[order.clamp_max_(scales.shape[0] - 1)]
            self._scales = by_row.view(-1, 2, width, blocks).permute(0, 3, 1, 2).contiguous()
        self.struct = WeightStruct(
            self._data.data_ptr(),
            None if self._scales is None else self._scales.data_ptr(),
            outputs,
            inputs,
            blocks,
            inputs if blocks == 1 else BLOCK - column_offset,
            width,
        )
        self._address = ctypes.addressof(self.struct)

    def linear(self, x_TD: Tensor, bias: Tensor | None = None) -> Tensor:
        """x W^T + bias [T, N], of bf16."""
        assert x_TD.dtype == torch.bfloat16 and x_TD.shape[1] == self.inputs
        assert bias is None or (bias.dtype == torch.bfloat16 and bias.is_contiguous())
        x_TD = x_TD.contiguous()
        out = x_TD.new_empty(x_TD.shape[0], self.outputs)
        _library().moeforge_linear(
            self._address,
            x_TD.data_ptr(),
            x_TD.shape[0],
            None if bias is None else bias.data_ptr(),
            out.data_ptr(),
            torch.get_num_threads(),
        )
        return out


class NativeExperts:
    """E experts: w13 [2F, D], gate rows first, `gated`, and w2 [D, F] of each; D and F multiples of PANEL."""

    def __init__(self, w13: Sequence[NativeWeight], w2: Sequence[NativeWeight]) -> None:
        self._held = (*w13, *w2)
        self.w13 = (WeightStruct * len(w13))(*(w.struct for w in w13))
        self.w2 = (WeightStruct * len(w2))(*(w.struct for w in w2))

    def routed(self, x_TD: Tensor, weights_TK: Tensor, experts_TK: Tensor) -> Tensor:
        """Sum over k of weights_TK times the output of expert experts_TK (int64): [T, D]."""
        assert x_TD.dtype == torch.bfloat16 and experts_TK.dtype == torch.int64
        x_TD, weights_TK, experts_TK = x_TD.contiguous(), weights_TK.float().contiguous(), experts_TK.contiguous()
        out = torch.empty_like(x_TD)
        tokens, top_k = experts_TK.shape
        _library().moeforge_experts(
            ctypes.addressof(self.w13),
            ctypes.addressof(self.w2),
            len(self.w13),
            x_TD.data_ptr(),
            tokens,
            top_k,
            experts_TK.data_ptr(),
            weights_TK.data_ptr(),
            out.data_ptr(),
            torch.get_num_threads(),
        )
        return out


class NativeGate:
    """A gate: logits in float32 of weight [E, D] and bias [E] or None, both float32, then as `gate` chooses."""

    def __init__(
        self, weight_ED: Tensor, bias_E: Tensor | None, top_k: int, scale: float | None, renormalize: bool
    ) -> None:
        experts, hidden = weight_ED.shape
        assert top_k <= experts and weight_ED.dtype == torch.float32 and weight_ED.is_contiguous()
        self._held, self.top_k = (weight_ED, bias_E), top_k
        bias = None if bias_E is None else bias_E.data_ptr()
        scale = math.nan if scale is None else scale
        self.struct = GateStruct(weight_ED.data_ptr(), bias, experts, hidden, top_k, scale, renormalize)

    def choose(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Weights float32 and experts int64 of each token [T, K]."""
        x_TD, tokens = x_TD.contiguous(), x_TD.shape[0]
        weights_TK = torch.empty(tokens, self.top_k, dtype=torch.float32)
        experts_TK = torch.empty(tokens, self.top_k, dtype=torch.int64)
        _library().moeforge_choose(
            ctypes.addressof(self.struct),
            x_TD.data_ptr(),
            tokens,
            weights_TK.data_ptr(),
            experts_TK.data_ptr(),
            torch.get_num_threads(),
        )
        return weights_TK, experts_TK


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """As `moeforge.kernels.rms_norm`."""
    x_TD = x_TD.contiguous()
    out, width = torch.empty_like(x_TD), x_TD.shape[-1]
    _library().moeforge_rms_norm(
        x_TD.data_ptr(), weight_D.data_ptr(), x_TD.numel() // width, width, eps, out.data_ptr(), torch.get_num_threads()
    )
    return out


def swiglu(h: Tensor) -> Tensor:
    """As `moeforge.kernels.swiglu`."""
    h = h.contiguous()
    width = h.shape[-1] // 2
    out = h.new_empty(*h.shape[:-1], width)
    _library().moeforge_swiglu(
        h.data_ptr(), out.numel() // max(width, 1), width, out.data_ptr(), torch.get_num_threads()
    )
    return out


def swiglu_backward(h: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """As `moeforge.kernels.swiglu.swiglu_backward`."""
    h, grad = h.contiguous(), grad.contiguous()
    width = grad.shape[-1]
    out, grad_h = torch.empty_like(grad), torch.empty_like(h)
    _library().moeforge_swiglu_backward(
        h.data_ptr(),
        grad.data_ptr(),
        grad.numel() // max(width, 1),
        width,
        out.data_ptr(),
        grad_h.data_ptr(),
        torch.get_num_threads(),
    )
    return out, grad_h


def split_qkv(qkv_TGxh: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[T, G, H/G + 2, h] to q [T, H, h], k and v [T, G, h], q and k turned by cos and sin [T, 1, h/2]."""
    tokens, groups, heads, head_dim = qkv_TGxh.shape
    qkv_TGxh, cos, sin = qkv_TGxh.contiguous(), cos.contiguous(), sin.contiguous()
    assert cos.shape == sin.shape == (tokens, 1, head_dim // 2)
    q = qkv_TGxh.new_empty(tokens, groups * (heads - 2), head_dim)
    k, v = (qkv_TGxh.new_empty(tokens, groups, head_dim) for _ in range(2))
    _library().moeforge_split_qkv(
        qkv_TGxh.data_ptr(),
        cos.data_ptr(),
        sin.data_ptr(),
        tokens,
        groups,
        heads - 2,
        head_dim,
        q.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        torch.get_num_threads(),
    )
    return q, k, v


def write_pages(pages: Tensor, slots_T: Tensor, k_TGh: Tensor, v_TGh: Tensor) -> None:
    """As `moeforge.kernels.write_pages`, into pages of bf16. Slots are not checked."""
    keys, values = pages
    assert pages.is_contiguous() and slots_T.dtype == torch.int64 and slots_T.is_contiguous()
    k_TGh, v_TGh = k_TGh.contiguous(), v_TGh.contiguous()
    _library().moeforge_write(
        k_TGh.data_ptr(),
        v_TGh.data_ptr(),
        slots_T.data_ptr(),
        len(slots_T),
        2 * k_TGh.shape[1] * k_TGh.shape[2],
        keys.data_ptr(),
        values.data_ptr(),
    )


def attention_struct(pages: Tensor, heads: int, window: int | None, table_width: int = 0) -> AttentionStruct:
    """Attention of `heads` over pages [2, P, S, G, h] as the library takes it; it holds their address alone."""
    assert pages.is_contiguous()
    keys, values = pages
    _, page_size, groups, head_dim = keys.shape
    return AttentionStruct(
        keys.data_ptr(),
        values.data_ptr(),
        page_size,
        groups,
        heads // groups,
        head_dim,
        table_width,
        window or 0,
        head_dim**-0.5,
        pages.dtype == torch.uint8,
    )


def attend(q_BHh: Tensor, pages: Tensor, table_BP: Tensor, length_B: Tensor, window: int | None) -> Tensor:
    """As `moeforge.kernels.paged_attention_decode`; h is a multiple of 16."""
    assert table_BP.dtype == length_B.dtype == torch.int64
    q_BHh, table_BP, length_B = q_BHh.contiguous(), table_BP.contiguous(), length_B.contiguous()
    attention = attention_struct(pages, q_BHh.shape[1], window, table_BP.shape[1])
    out = torch.empty_like(q_BHh)
    _library().moeforge_attend(
        ctypes.addressof(attention),
        q_BHh.data_ptr(),
        table_BP.data_ptr(),
        length_B.data_ptr(),
        len(q_BHh),
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out
