"""From the fused projection to rotated queries and keys, and values."""

from __future__ import annotations

from torch import Tensor

from moeforge.kernels import native
from moeforge.kernels.backend import use_triton
from moeforge.kernels.rope import rotate


def split_qkv(qkv_TGxh: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[T, G, H/G + 2, h], query heads, key and value of each group, to q [T, H, h], k and v [T, G, h]."""
    q, k, v = (x.flatten(1, 2) for x in qkv_TGxh.split((qkv_TGxh.shape[2] - 2, 1, 1), dim=2))
    return q, k, v


def split_rotated_qkv(qkv_TGxh: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`split_qkv`, then `rotate` of q and k; cos and sin [T, 1, h/2]."""
    if use_triton(qkv_TGxh):
        from moeforge.kernels.triton.qkv import split_rotated_qkv as on_gpu

        return on_gpu(qkv_TGxh, cos, sin)
    if native.takes(qkv_TGxh, cos, sin) and qkv_TGxh.numel():
        return native.split_qkv(qkv_TGxh, cos, sin)
    q, k, v = split_qkv(qkv_TGxh)
    return rotate(q, cos, sin), rotate(k, cos, sin), v
