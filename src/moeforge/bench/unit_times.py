"""Seconds of each kind of unit on this processor: what a pipeline's stages are planned from."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from moeforge.config.model import ModelConfig
from moeforge.layout import Layout, unit_names
from moeforge.model import DenseAttention, ForwardContext, RouterRecord, RoutingGroups, Transformer
from moeforge.model.rotary import rotary_angles
from moeforge.parallel import Mesh
from moeforge.parallel.parameters import parameter_parts
from moeforge.plan.pipeline import UnitTime
from moeforge.train.optimizer import Optimizer

Meet = Callable[[], None]


def unit_times(
    config: ModelConfig, dtype: torch.dtype, sequences: int, positions: int, repeats: int = 7, meet: Meet = lambda: None
) -> list[UnitTime]:
    """Median seconds of every unit of `config` in forward order, for micro-batches of `sequences` x `positions`.

    Units of a kind are alike, so one layer of each is measured, with random weights. `meet` is called before every
    measurement: processes that will compute at the same time should also be measured at the same time.
    """
    kinds = {"dense": _one_layer(config, routed=False), "routed": _one_layer(config, routed=True)}
    wanted = {"routed" if config.is_moe_layer(layer) else "dense" for layer in range(config.num_layers)}
    found: dict[str, dict[str, UnitTime]] = {}
    for kind in sorted(wanted):
        found[kind] = _measure(kinds[kind], dtype, sequences, positions, repeats, meet)
    times = []
    for name in unit_names(config):
        layer = name.split(".")
        routed = len(layer) == 3 and config.is_moe_layer(int(layer[1]))
        kind = "routed" if routed else min(wanted) if len(layer) < 3 or layer[2] == "attention" else "dense"
        times.append(found[kind][layer[-1]])
    return times


def _one_layer(config: ModelConfig, routed: bool) -> ModelConfig:
    moe = config.moe if routed else None
    return replace(config, num_layers=1, moe=None if moe is None else replace(moe, layer_frequency=1))


def _measure(
    config: ModelConfig, dtype: torch.dtype, sequences: int, positions: int, repeats: int, meet: Meet
) -> dict[str, UnitTime]:
    torch.manual_seed(0)
    model = Transformer(config).to(dtype)
    model.reset_parameters()
    tokens = torch.randint(0, config.vocab_size, (sequences * positions,))
    places = torch.arange(positions).repeat(sequences)
    alpha = torch.full((len(config.moe_layers),), 0.01, dtype=torch.float64)
    record = None
    if config.moe is not None:
        record = RouterRecord(config.moe_layers, config.moe.num_experts, 1, alpha, len(tokens))
    groups = None if record is None else RoutingGroups(sequences)
    context = ForwardContext(DenseAttention(sequences, positions), groups=groups, record=record)
    rotary = rotary_angles(config, places, dtype)
    update = _update_seconds(model, config, repeats)
    hidden = torch.randn(len(tokens), config.hidden_size, dtype=dtype)
    result = {}
    for name, unit in model.units():
        forward, backward = [], []
        for _ in range(repeats + 1):
            x: Tensor = tokens if name == "embed" else hidden.clone().requires_grad_()
            grad = torch.randn_like(hidden)
            meet()
            begin = time.perf_counter()
            y = unit(x, rotary, context)
            if name == "head":
                y, grad = model.loss(y, tokens, context), torch.tensor(1.0)
            middle = time.perf_counter()
            y.backward(grad)
            forward.append(middle - begin)
            backward.append(time.perf_counter() - middle)
        share = config.unit_parameters(name) * update
        result[name.split(".")[-1]] = UnitTime(statistics.median(forward[1:]), statistics.median(backward[1:]), share)
    return result


def _update_seconds(model: Transformer, config: ModelConfig, repeats: int) -> float:
    """Optimiser seconds a parameter."""
    layout = Layout.single(config)
    parameters = dict(model.named_parameters())
    masters = next(model.parameters()).dtype == torch.bfloat16
    parts = parameter_parts(config, layout, 0, 0, 0)
    optimizer = Optimizer(parameters, parts, Mesh.single(layout, torch.device("cpu")), zero=True, masters=masters)
    seconds = []
    for _ in range(repeats + 1):
        for parameter in parameters.values():
            parameter.grad = torch.full_like(parameter, 1e-3)
        begin = time.perf_counter()
        optimizer.step(1e-9)
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds[1:]) / sum(parameter.numel() for parameter in parameters.values())
