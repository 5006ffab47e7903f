"""One rank's part of a model, read from a checkpoint or made up."""

from __future__ import annotations

import torch
from torch import nn

from moeforge.checkpoint import Checkpoint, load_model
from moeforge.checkpoint.load import load_part
from moeforge.config.model import ModelConfig
from moeforge.errors import UserError
from moeforge.kernels.fp8 import E4M3
from moeforge.layout import Layout
from moeforge.model import Transformer
from moeforge.parallel.parameters import parameter_parts


def load_rank(
    checkpoint: Checkpoint, layout: Layout, rank: int, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> Transformer:
    """The weights that `rank` holds, in `dtype` on `device`, for inference.

    Weights are read one at a time and cut before they are moved. Raises UserError for a layout that is not of this
    model or not for serving, and for weights that are NaN or infinite.
    """
    check_serving_layout(layout, checkpoint.config)
    if layout.tp == 1:
        return load_model(checkpoint, dtype, device).eval().requires_grad_(False)
    model = _empty(checkpoint.config, layout, rank)
    parts = parameter_parts(checkpoint.config, layout, 0, rank, rank)
    with torch.no_grad():
        model.load_state_dict(load_part(checkpoint, parts, dtype, device), assign=True)
    return model.eval().requires_grad_(False)


def dummy_rank(
    config: ModelConfig,
    layout: Layout,
    rank: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Transformer:
    """Random weights of `rank`'s sizes, made on `device` without a copy on the host.

    They are those of a model before training, under which activations stay finite. Other layouts give other models.
    Raises UserError for a layout that is not of this model or not for serving.
    """
    check_serving_layout(layout, config)
    device = torch.device(device)
    model = _empty(config, layout, rank)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            kept = parameter.dtype == E4M3 or name.endswith(("scales", "input_scale"))
            made = torch.empty_like(parameter, dtype=parameter.dtype if kept else dtype, device=device)
            module.register_parameter(name, nn.Parameter(made, requires_grad=False))
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed + rank)
        model.reset_parameters()
    return model.eval().requires_grad_(False)


def check_serving_layout(layout: Layout, config: ModelConfig) -> None:
    """Raises UserError unless `layout` is of this model and shares every layer, each expert included, among all."""
    layout.check(config, layout.world_size)
    if len(layout.stages) > 1 or layout.tp != layout.world_size or layout.etp != layout.tp:
        raise UserError(
            f"layout with {len(layout.stages)} stages, dp = {layout.dp}, ep = {layout.ep}: serving shares all layers "
            "and all experts among all ranks, which is 1 of each; make a plan with `moeforge plan serve`"
        )


def _empty(config: ModelConfig, layout: Layout, rank: int) -> Transformer:
    with torch.device("meta"):
        return Transformer(config, layout, rank=rank, expert_rank=rank)
