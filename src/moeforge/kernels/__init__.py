"""Computations as single functions, each with a reference implementation. Imports torch only.

Legend used everywhere: T tokens, D hidden, F FFN width, E experts, K top-k, H heads, G KV groups, N = T*K
assignments, R rows of the expert buffer, V vocabulary, h head dimension.
"""

from moeforge.kernels.cross_entropy import linear_cross_entropy
from moeforge.kernels.experts import expert_mlp, expert_mlp_reference
from moeforge.kernels.gate import Gate, gate, normalize_logits
from moeforge.kernels.linear import PreparedWeight, Weight, linear
from moeforge.kernels.norm import rms_norm
from moeforge.kernels.permute import Permutation, combine, expert_permutation, gather, row_alignment
from moeforge.kernels.prepared_experts import PreparedExperts
from moeforge.kernels.prepared_gate import PreparedGate
from moeforge.kernels.qkv import split_qkv, split_rotated_qkv
from moeforge.kernels.rope import rotate
from moeforge.kernels.router import router_logits
from moeforge.kernels.swiglu import swiglu, swiglu_invariant

__all__ = [
    "Gate",
    "Permutation",
    "PreparedExperts",
    "PreparedGate",
    "PreparedWeight",
    "Weight",
    "combine",
    "expert_mlp",
    "expert_mlp_reference",
    "expert_permutation",
    "gate",
    "gather",
    "linear",
    "linear_cross_entropy",
    "normalize_logits",
    "rms_norm",
    "rotate",
    "router_logits",
    "row_alignment",
    "split_qkv",
    "split_rotated_qkv",
    "swiglu",
    "swiglu_invariant",
]
