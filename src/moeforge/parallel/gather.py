"""The whole of a model that is spread over ranks, one weight at a time, and its way to a Hugging Face directory."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from moeforge.checkpoint import Checkpoint, write_model
from moeforge.checkpoint.names import unfuse
from moeforge.config.model import ModelConfig
from moeforge.errors import RunError, UserError
from moeforge.model import Transformer
from moeforge.parallel.mesh import Mesh
from moeforge.parallel.parameters import ParameterPart, parameter_parts


def full_weights(
    mesh: Mesh, config: ModelConfig, local: Mapping[str, Tensor], dtype: torch.dtype
) -> Callable[[str], Tensor]:
    """A function from an in-memory name to the global weight, collected on the first rank.

    `local` are the parameters of this rank's stages, all in `dtype`. All ranks call the function with the same
    names in the same order; on all but the first it returns a tensor without data (on the meta device).
    """
    held = _holders(mesh, config)
    with torch.device("meta"):
        shapes = {name: weight.shape for name, weight in Transformer(config).state_dict().items()}

    def full(name: str) -> Tensor:
        parts = held[name]
        if mesh.rank != 0:
            for source, _ in parts:
                if source == mesh.rank:
                    mesh.world.send(local[name], to=0)
            return torch.empty(shapes[name], dtype=dtype, device="meta")
        if len(parts) == 1 and parts[0][0] == 0:
            return local[name]
        whole = torch.empty(shapes[name], dtype=dtype)
        for source, part in parts:
            if source == 0:
                part.place(whole, local[name])
            else:
                received = torch.empty(part.shape, dtype=dtype, device=mesh.device)
                part.place(whole, mesh.world.receive(received, source))
        return whole

    return full


def _holders(mesh: Mesh, config: ModelConfig) -> dict[str, list[tuple[int, ParameterPart]]]:
    """For every weight its parts, which cover it without overlap, each with the first rank that holds it."""
    layout = mesh.layout
    table = cache(lambda stage, tp, expert: parameter_parts(config, layout, stage, tp, expert))
    found: dict[str, dict[tuple[tuple[int, ...], tuple[int, ...]], tuple[int, ParameterPart]]] = {}
    for rank in range(layout.world_size):
        at = layout.coordinates(rank)
        for stage in layout.stages_of(at.pp):
            for name, part in table(stage, at.tp, at.expert_rank).items():
                if math.prod(part.size):
                    found.setdefault(name, {}).setdefault((part.offset, part.size), (rank, part))
    return {name: list(parts.values()) for name, parts in found.items()}


class _Stopped(Exception):
    """The first rank cannot write."""


def save_distributed(
    mesh: Mesh, chunks: Sequence[Transformer], directory: Path, tokenizer_from: Checkpoint | None = None
) -> Path:
    """Write a model spread over ranks as `save_model` writes a whole one; the first rank writes. All ranks call it.

    Where the first rank cannot (a directory in use, a full disk), its UserError or RunError is raised on all.
    """
    config = chunks[0].config
    local = {name: parameter.detach() for chunk in chunks for name, parameter in chunk.named_parameters()}
    # A rank may hold nothing at all.
    types = mesh.world.all_gather_object(next((weight.dtype for weight in local.values()), None))
    dtype = next(found for found in types if found is not None)
    collect = full_weights(mesh, config, local, dtype)
    failure: Exception | None = None

    def go_on() -> None:
        """Before each weight, so that ranks wait no longer than one takes, and end together."""
        stop = torch.tensor(float(failure is not None), device=mesh.device)
        if mesh.world.broadcast(stop, 0).item():
            raise _Stopped

    def weight(name: str) -> Tensor:
        go_on()
        return collect(name)

    try:
        if mesh.rank == 0:
            try:
                write_model(config, weight, dtype.itemsize, directory, tokenizer_from)
            except Exception as error:
                failure = error
        else:
            for _ in unfuse(config, weight):
                pass
        go_on()
    except _Stopped:
        if failure is not None:
            known = (
                failure if isinstance(failure, UserError | RunError) else RunError(f"the first rank failed: {failure}")
            )
        shared = mesh.world.all_gather_object(known if mesh.rank == 0 else None)
        raise failure or shared[0] from None
    return directory
