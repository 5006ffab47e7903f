"""The expert layers that are measured on a GPU, and what the GPU gives at best."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moeforge.bench.kernels_timing import copy_bandwidth, dense_ceiling
from moeforge.config.model import ModelConfig, MoEConfig

ROUNDS = 7


@dataclass(frozen=True)
class Layer:
    """An expert layer of a model, and the tokens of a micro-batch that trains it."""

    name: str
    experts: int
    top_k: int
    hidden: int
    ffn: int
    tokens: int = 8192

    @property
    def flops(self) -> float:
        """Of all experts' forward pass over a micro-batch."""
        return 2.0 * 3 * self.tokens * self.top_k * self.hidden * self.ffn

    def config(self) -> ModelConfig:
        """A model of such layers."""
        return ModelConfig(
            vocab_size=64, hidden_size=self.hidden, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=16,
            ffn_size=self.ffn, moe=MoEConfig(self.experts, self.top_k, self.ffn),
        )  # fmt: skip


MIXTRAL = Layer("mixtral-8x7b", 8, 2, 4096, 14336)
SKYWORK = Layer("skywork-moe", 16, 2, 4608, 12288)
QWEN = Layer("qwen3-30b-a3b", 128, 8, 2048, 768)
TINY = Layer("tiny", 4, 2, 64, 48, tokens=32)


def ceilings(device: torch.device) -> dict[str, float]:
    """What the device gives: bf16 TFLOP/s of a dense matmul, and GB/s of a copy (read and written)."""
    small = device.type == "cpu"
    return {
        "matmul_tflops": dense_ceiling(device, (64,) if small else (4096, 8192)) / 1e12,
        "copy_gbytes_per_second": copy_bandwidth(device, 2**20 if small else 2**31) / 1e9,
    }


def random(device: torch.device, *shape: int) -> Tensor:
    return torch.randn(shape, device=device, dtype=torch.bfloat16)


def routing(layer: Layer, tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Weights and experts [T, K] of tokens that choose at random."""
    chosen = torch.rand(tokens, layer.experts, device=device).topk(layer.top_k)
    return chosen.values.softmax(-1), chosen.indices
