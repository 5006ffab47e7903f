"""Training steps of a slice of Skywork-MoE on one GPU: forward, backward, AdamW, everything in bf16.

The model's own forward and backward with router statistics and balance loss, as `moeforge train` runs them; the
optimiser is torch's fused AdamW on bf16 weights and moments, because float32 masters would leave less room for layers.
"""

from __future__ import annotations

import statistics
from dataclasses import replace
from typing import Any

import torch

from moeforge.bench.clock import Clock
from moeforge.bench.gpu_layer import ceilings
from moeforge.config.model import ModelConfig
from moeforge.config.presets import model_preset
from moeforge.model import DenseAttention, ForwardContext, RouterRecord, RoutingGroups, Transformer
from moeforge.plan.cost import model_flops_per_token
from moeforge.plan.workload import Workload

FLOP_CONVENTION = (
    "6 FLOPs for each weight that a token meets (embedding lookup none, head all, K experts of a layer) and 6 L H h S "
    "for causal attention; over the matmul rate that was measured in this run"
)
_BYTES = 8
"""Of a parameter: weight, gradient, two moments."""
_MOST_LAYERS = 2
_WARM_UPS, _STEPS = 3, 5


def train(device: torch.device) -> dict[str, Any]:
    """Steps of 2 x 4096 tokens; on a CPU of a tiny model."""
    config, sequences, positions = model_preset("skywork-moe"), 2, 4096
    assert config.moe is not None
    layers = 1
    if device.type == "cpu":
        moe = replace(config.moe, num_experts=4, expert_size=48)
        config = replace(config, vocab_size=96, hidden_size=64, num_heads=4, num_kv_heads=4, head_dim=16, moe=moe)
        positions = 16
    else:
        free = 0.8 * torch.cuda.mem_get_info(device)[0] / _BYTES
        each = config.unit_parameters("layers.0.attention") + config.unit_parameters("layers.0.ffn")
        ends = config.unit_parameters("embed") + config.unit_parameters("head")
        layers = max(1, min(_MOST_LAYERS, int((free - ends) / each)))
    return _steps(replace(config, num_layers=layers), sequences, positions, device)


def _steps(config: ModelConfig, sequences: int, positions: int, device: torch.device) -> dict[str, Any]:
    ceiling = ceilings(device)["matmul_tflops"]
    moe, tokens = config.moe, sequences * positions
    assert moe is not None
    torch.manual_seed(0)
    with torch.device("meta"):
        model = Transformer(config).bfloat16()
    model.to_empty(device=device).reset_parameters()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    tokens_T = torch.randint(0, config.vocab_size, (tokens + 1,), device=device)
    positions_T = torch.arange(positions, device=device).repeat(sequences)
    alpha = torch.full((config.num_layers,), 0.01, dtype=torch.float64, device=device)
    record = RouterRecord(config.moe_layers, moe.num_experts, 1, alpha, tokens)
    attention = DenseAttention(sequences, positions)
    context = ForwardContext(attention, groups=RoutingGroups(sequences), record=record)
    clock, seconds = Clock(device), []
    for _ in range(_WARM_UPS + _STEPS):
        begin = clock.mark()
        hidden_TD = model(tokens_T[:-1], positions_T, context)
        loss = model.loss(hidden_TD, tokens_T[1:], context) / tokens
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        end = clock.mark()
        clock.wait()
        seconds.append(clock.seconds(begin, end))
    step = statistics.median(seconds[_WARM_UPS:])
    work = Workload(config, "bf16_pure", positions, sequences, sequences)
    tflops = model_flops_per_token(work) * tokens / step / 1e12
    return {
        "layers": config.num_layers,
        "parameters": config.parameters(),
        "tokens": tokens,
        "step_ms": 1e3 * step,
        "tokens_per_second": tokens / step,
        "tflops": tflops,
        "ceiling_tflops": ceiling,
        "mfu": tflops / ceiling,
        "flop_convention": FLOP_CONVENTION,
        "loss": float(loss.detach()),
        **({"peak_gbytes": torch.cuda.max_memory_allocated(device) / 1e9} if device.type == "cuda" else {}),
    }
