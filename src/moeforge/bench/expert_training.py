"""Experts' forward and backward against plain `F.grouped_mm`: `python -m moeforge.bench.expert_training [--out FILE]`.

An expert layer of SmolLM2-135M upcycled to 8 experts, top-2, in bf16. Both sides get the buffer of an expert-sorted
micro-batch, without gathering or combining: the plain side rows as they are routed, ours filled up as our dispatcher
does. "routed": every micro-batch has other row counts, as in training; "even": always the same.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moeforge.bench.ceiling import matmul_ceiling
from moeforge.files import write_whole
from moeforge.heap import keep_freed_memory
from moeforge.kernels import expert_mlp, row_alignment

_D, _F, _EXPERTS, _TOP_K = 576, 1536, 8, 2
_TOKENS = (2048, 4096)
_WARM_UPS = 4

ExpertFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class Timing(NamedTuple):
    """Seconds of one micro-batch."""

    forward: float
    backward: float


def plain(x_RD: Tensor, w13: Tensor, w2: Tensor, offsets_E: Tensor) -> Tensor:
    """`expert_mlp` as torch's functions and its autograd have it."""
    gate, up = F.grouped_mm(x_RD, w13.transpose(1, 2), offs=offsets_E).chunk(2, dim=-1)
    return F.grouped_mm(F.silu(gate) * up, w2.transpose(1, 2), offs=offsets_E)


def compare(tokens: int, even: bool, rounds: int, dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    """Both sides in turn on the same `rounds` routings; the ratio is the median of theirs over ours."""
    w13 = (torch.randn(_EXPERTS, 2 * _F, _D) / _D**0.5).to(dtype).requires_grad_()
    w2 = (torch.randn(_EXPERTS, _D, _F) / _F**0.5).to(dtype).requires_grad_()
    found: list[tuple[Timing, Timing]] = []
    for index in range(_WARM_UPS + rounds):
        sizes_E = torch.full((_EXPERTS,), tokens * _TOP_K // _EXPERTS)
        if not even:
            sizes_E = torch.rand(tokens, _EXPERTS).topk(_TOP_K).indices.flatten().bincount(minlength=_EXPERTS)
        alignment = row_alignment(dtype)
        filled_E = (sizes_E + alignment - 1) // alignment * alignment
        sides = [(plain, sizes_E), (expert_mlp, filled_E)]
        timed = [_timed(function, sizes, w13, w2) for function, sizes in sides[:: -1 if index % 2 else 1]]
        theirs, ours = timed[:: -1 if index % 2 else 1]
        if index >= _WARM_UPS:
            found.append((theirs, ours))
    flops = 2 * 3 * 3 * tokens * _TOP_K * _D * _F
    return {
        "tokens": tokens,
        "rows": "even" if even else "routed",
        "ratio": statistics.median(sum(theirs) / sum(ours) for theirs, ours in found),
        **{
            name: {
                "forward_ms": 1e3 * statistics.median(pair[side].forward for pair in found),
                "backward_ms": 1e3 * statistics.median(pair[side].backward for pair in found),
                "gflops": flops / statistics.median(sum(pair[side]) for pair in found) / 1e9,
            }
            for side, name in enumerate(("grouped_mm", "moeforge"))
        },
        "rounds": [[list(theirs), list(ours)] for theirs, ours in found],
    }


def _timed(function: ExpertFunction, sizes_E: Tensor, w13: Tensor, w2: Tensor) -> Timing:
    offsets_E = sizes_E.cumsum(0).to(torch.int32)
    x_RD = torch.randn(int(offsets_E[-1]), _D).to(w13.dtype).requires_grad_()
    grad_RD = torch.randn(x_RD.shape).to(w13.dtype)
    w13.grad = w2.grad = None
    begin = time.perf_counter()
    y_RD = function(x_RD, w13, w2, offsets_E)
    middle = time.perf_counter()
    y_RD.backward(grad_RD)
    return Timing(middle - begin, time.perf_counter() - middle)


def main(rounds: int) -> dict[str, Any]:
    """Every size and kind of rows; the matmul rate of the same run."""
    keep_freed_memory()
    torch.manual_seed(0)
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "matmul_gflops": matmul_ceiling(torch.bfloat16, inner=_D, columns=2 * _F),
        "cases": [compare(tokens, even, rounds) for tokens in _TOKENS for even in (False, True)],
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--rounds", type=int, default=15, help="micro-batches timed in each case")
    given = parser.parse_args()
    text = json.dumps(main(given.rounds), indent=2)
    print(text)
    if given.out is not None:
        write_whole(given.out, text + "\n")
