"""Cross-compilation of Triton kernels without a GPU, down to the machine code of each architecture."""

from __future__ import annotations

from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

ARCHITECTURES = (86, 89, 90)
SHARED_BYTES = {86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024}
"""Shared memory that one block may have (CUDA C++ Programming Guide, compute capabilities)."""


def cross_compile(
    kernel: Any,
    architecture: int,
    types: dict[str, str],
    constants: dict[str, Any],
    num_warps: int = 4,
    num_stages: int = 3,
    aligned: bool = True,
) -> CompiledKernel:
    """Machine code of a `triton.jit` function; fails where the GPU would refuse the shared memory it asks for.

    `types`: what each runtime argument is, in Triton's words: "*bf16", "*fp8e4nv", "*u8", "i32", "i64", "fp32".
    `constants`: values of the others: `tl.constexpr` arguments, strides that are 1, pointers that are None.
    `aligned`: pointers and integers are multiples of 16, as Triton finds out by itself at a launch.
    """
    missing = set(kernel.arg_names) ^ (types.keys() | constants.keys())
    assert not missing, f"arguments missing or unknown: {sorted(missing)}"
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    divisible = [["tt.divisibility", 16]] if aligned else []
    attributes = {
        (index,): divisible for index, kind in enumerate(signature.values()) if kind[0] == "*" or kind in ("i32", "i64")
    }
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, attributes),
        target=GPUTarget("cuda", architecture, 32),
        options={"num_warps": num_warps, "num_stages": num_stages},
    )
    shared = compiled.metadata.shared
    assert shared <= SHARED_BYTES[architecture], f"{kernel.__name__}: {shared} bytes of shared memory on {architecture}"
    return compiled
