"""Which weights of a model are FP8 (e4m3), with what scales, and what multiplies them: plain data, no torch.

A *matrix* is what a model multiplies by at once, under its in-memory name: `layers.3.attention.qkv`, `.attention.o`,
`layers.3.ffn.w13`, `.ffn.w2`, or `layers.3.ffn.experts` (all of a layer's). On disk it is several modules.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

from moeforge.errors import UserError

Scales = Literal["tensor", "channel", "block128"]
Activations = Literal["none", "dynamic", "static"]

_ON_DISK = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
_EXPERT = re.compile(r"(.*)\.block_sparse_moe\.experts\.(\d+)\.(w[123])")


@dataclass(frozen=True)
class QuantizationConfig:
    """e4m3 weights of all projections and experts but those `kept` (matrices); the rest of the model is as stored.

    scales        one for each tensor, output channel, or block of 128 x 128
    activations   none: inputs stay as they are (weight-only); dynamic: e4m3 with a scale a token (where weights have
                  blocks, a block of it); static: e4m3 with one scale for each matrix, stored beside it
    """

    scales: Scales
    activations: Activations = "none"
    kept: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for key, kind in (("scales", Scales), ("activations", Activations)):
            value, allowed = getattr(self, key), get_args(kind)
            if value not in allowed:
                raise UserError(f"quantization {key} = {value!r}: must be one of {', '.join(allowed)}")
        if self.scales == "block128" and self.activations == "static":
            raise UserError(
                "quantization activations = 'static' with scales = 'block128': no engine reads both; take dynamic or "
                "none, or scales = tensor or channel"
            )


class _Experts(Protocol):
    @property
    def num_experts(self) -> int: ...


class _Model(Protocol):
    @property
    def num_layers(self) -> int: ...
    @property
    def moe(self) -> _Experts | None: ...
    def is_moe_layer(self, layer: int) -> bool: ...


def matrices(model: _Model) -> dict[str, tuple[str, ...]]:
    """Every matrix that may be FP8, with its modules' canonical names (Llama's and Mixtral's)."""
    found: dict[str, tuple[str, ...]] = {}
    for i in range(model.num_layers):
        layer = f"model.layers.{i}"
        found[f"layers.{i}.attention.qkv"] = tuple(f"{layer}.self_attn.{part}_proj" for part in "qkv")
        found[f"layers.{i}.attention.o"] = (f"{layer}.self_attn.o_proj",)
        if model.moe is not None and model.is_moe_layer(i):
            block, experts = f"{layer}.block_sparse_moe.experts", range(model.moe.num_experts)
            found[f"layers.{i}.ffn.experts"] = tuple(f"{block}.{e}.{part}" for e in experts for part in _ON_DISK)
        else:
            found[f"layers.{i}.ffn.w13"] = (f"{layer}.mlp.gate_proj", f"{layer}.mlp.up_proj")
            found[f"layers.{i}.ffn.w2"] = (f"{layer}.mlp.down_proj",)
    return found


def kept_by_user(model: _Model, names: Collection[str]) -> tuple[str, ...]:
    """The matrices of which a module's name holds one of `names` as whole parts ("layers.0", "self_attn", "w2").

    Raises UserError for a name that none holds, and for names that leave nothing to quantise.
    """
    kept: set[str] = set()
    for name in names:
        found = {
            matrix
            for matrix, modules in matrices(model).items()
            if any(f".{name}." in f".{way}." for module in modules for way in (matrix, *spellings(module)))
        }
        if not found:
            raise UserError(f"--keep {name}: no matrix is called so; such as o_proj, layers.0, or self_attn")
        kept |= found
    if len(kept) == len(matrices(model)):
        raise UserError(f"--keep {', '.join(names)}: keeps all weights as they are; nothing is left to quantise")
    return tuple(matrix for matrix in matrices(model) if matrix in kept)


def kept_in_files(model: _Model, names: Collection[str]) -> tuple[str, ...]:
    """The matrices for which a checkpoint with tensors of these names has no scales.

    Raises UserError where only some modules of a matrix have some, or the model must have more tensors.
    """
    layers, experts = model.num_layers, model.moe.num_experts if model.moe else 0
    if max(layers, experts) > len(names):  # before `matrices` makes so many names
        raise UserError(
            f"config.json asks for {layers} layers and {experts} experts, but the files hold only {len(names)} tensors"
        )
    scaled = {name.rpartition(".")[0] for name in names if name.endswith((".weight_scale", ".weight_scale_inv"))}
    return _unlike(matrices(model), lambda module: not scaled.isdisjoint(spellings(module)))


def kept_in_list(model: _Model, ignored: Iterable[str]) -> tuple[str, ...]:
    """The matrices whose modules are in a config.json's list: full names, or "re:" and a pattern."""
    names = set(ignored)
    try:
        patterns = [re.compile(name.removeprefix("re:")) for name in names if name.startswith("re:")]
    except re.error as error:
        raise UserError(f"config.json: quantization_config.ignore: {error.pattern!r} is no pattern ({error})") from None

    def quantized(module: str) -> bool:
        ways = spellings(module)
        return names.isdisjoint(ways) and not any(pattern.match(way) for pattern in patterns for way in ways)

    return _unlike(matrices(model), quantized)


def spellings(module: str) -> tuple[str, ...]:
    """The canonical name of a module, and what Qwen3-MoE and OLMoE call it on disk."""
    match = _EXPERT.fullmatch(module)
    return (module,) if match is None else (module, f"{match[1]}.mlp.experts.{match[2]}.{_ON_DISK[match[3]]}")


def _unlike(found: dict[str, tuple[str, ...]], quantized: Callable[[str], bool]) -> tuple[str, ...]:
    kept = []
    for matrix, modules in found.items():
        states = [quantized(module) for module in modules]
        if any(states) and not all(states):
            raise UserError(
                f"config.json: quantization_config: {modules[states.index(False)]} is not FP8 but "
                f"{modules[states.index(True)]} is; they are one matrix, of which all or nothing must be FP8"
            )
        if not any(states):
            kept.append(matrix)
    return tuple(kept)
