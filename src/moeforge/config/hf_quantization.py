"""`quantization_config` of a config.json to and from `QuantizationConfig`: the FP8 forms that engines know.

- quant_method fp8 with weight_block_size [128, 128]: transformers, vLLM, SGLang, llama.cpp (`weight_scale_inv`);
- quant_method fp8 without it: one scale a tensor (`weight_scale`), as the released Skywork-MoE-Base-FP8;
- quant_method compressed-tensors, format float-quantized: scales a channel (`weight_scale` [rows, 1]), or the others.

That weights alone are FP8 the first two cannot say: other engines then quantise activations too, and our own key
`weight_only` says it to us.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, Any

from moeforge.config.quantization import (
    Activations,
    QuantizationConfig,
    Scales,
    kept_in_files,
    kept_in_list,
)
from moeforge.errors import UserError

if TYPE_CHECKING:
    from moeforge.config.model import ModelConfig

_BLOCK = [128, 128]
_KEY = "config.json: quantization_config"


def quantization_from_hf(data: Any, model: ModelConfig, names: Collection[str]) -> QuantizationConfig | None:
    """What a `quantization_config` says of this model's weights, None for none.

    `names`, the checkpoint's tensor names, tell which weights have scales; without them the list in `data` does. Raises
    UserError for a method other than the three, or anything in them that would be computed differently.
    """
    if data is None:
        return None
    if not isinstance(data, dict):
        raise UserError(f"{_KEY} = {data!r}: must be a mapping")
    method = data.get("quant_method", "unknown")
    if method == "fp8":
        scales, activations = _from_fp8(data, names)
        ignored = data.get("ignored_layers") or data.get("modules_to_not_convert") or ()
    elif method == "compressed-tensors":
        scales, activations = _from_compressed(data)
        ignored = data.get("ignore") or ()
    else:
        raise UserError(
            f'{_KEY}.quant_method = "{method}" is not supported here; only fp8, compressed-tensors of format '
            "float-quantized, and unquantised checkpoints are"
        )
    if not isinstance(ignored, (list, tuple)) or not all(isinstance(name, str) for name in ignored):
        raise UserError(f"{_KEY}: modules that are not quantised = {ignored!r}: must be a list of names")
    kept = kept_in_files(model, names) if names else kept_in_list(model, ignored)
    return QuantizationConfig(scales, activations, kept)


def quantization_to_hf(quantization: QuantizationConfig, unquantized: Iterable[str]) -> dict[str, Any]:
    """The `quantization_config`; `unquantized` are the modules with weights as they were, by their names on disk."""
    q, ignored = quantization, list(unquantized)
    if q.scales == "channel":
        dynamic = q.activations == "dynamic"
        kind = {"strategy": "token" if dynamic else "tensor", "dynamic": dynamic}
        inputs = {"num_bits": 8, "type": "float", "symmetric": True, **kind}
        group = {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False},
            "input_activations": None if q.activations == "none" else inputs,
        }
        return {
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": ignored,
        }
    scheme = "static" if q.activations == "static" else "dynamic"
    data: dict[str, Any] = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": scheme}
    if q.scales == "block128":
        data |= {"weight_block_size": _BLOCK, "modules_to_not_convert": ignored}
    else:
        data["ignored_layers"] = ignored
    return data | ({"weight_only": True} if q.activations == "none" else {})


def _from_fp8(data: dict[str, Any], names: Collection[str]) -> tuple[Scales, Activations]:
    _require(data, "fmt", ("e4m3",), "e4m3")
    _require(data, "activation_scheme", ("dynamic", "static"), "dynamic")
    _require(data, "weight_only", (True, False), False)
    # A missing size means blocks to engines that know no other (transformers), one scale a tensor where the released
    # files use the other name.
    inverse = any(name.endswith(".weight_scale_inv") for name in names)
    block = data.get("weight_block_size", _BLOCK if inverse else None)
    if block is not None and block != _BLOCK:
        raise UserError(f"{_KEY}.weight_block_size = {block}: must be {_BLOCK} or null")
    activations: Activations = "none" if data.get("weight_only") else data.get("activation_scheme", "dynamic")
    return ("tensor" if block is None else "block128"), activations


def _from_compressed(data: dict[str, Any]) -> tuple[Scales, Activations]:
    _require(data, "format", ("float-quantized",), "unknown")
    for key in ("kv_cache_scheme", "sparsity_config", "transform_config"):
        if data.get(key):
            raise UserError(f"{_KEY}.{key} = {data[key]}: must be absent")
    groups = data.get("config_groups")
    group = next(iter(groups.values())) if isinstance(groups, dict) and len(groups) == 1 else None
    weights = group.get("weights") if isinstance(group, dict) else None
    if not isinstance(group, dict) or not isinstance(weights, dict):
        raise UserError(f"{_KEY}.config_groups = {groups}: must be one group with weights")
    kinds: dict[Any, Scales] = {"tensor": "tensor", "channel": "channel", "block": "block128"}
    strategy, blocks = weights.get("strategy"), weights.get("block_structure")
    scales = kinds.get(strategy) if isinstance(strategy, str) else None
    if scales is None or not _symmetric_fp8(weights) or blocks not in (None, _BLOCK):
        raise UserError(
            f"{_KEY}.weights = {weights}: must be symmetric 8-bit floats with strategy tensor, channel, or block of "
            f"{_BLOCK}"
        )
    if group.get("output_activations"):
        raise UserError(f"{_KEY}.output_activations = {group['output_activations']}: must be null")
    inputs = group.get("input_activations")
    if inputs is None:
        return scales, "none"
    if not isinstance(inputs, dict) or not _symmetric_fp8(inputs) or inputs.get("dynamic", False) not in (True, False):
        raise UserError(
            f"{_KEY}.input_activations = {inputs}: must be null or symmetric 8-bit floats with dynamic true or false"
        )
    return scales, ("dynamic" if inputs.get("dynamic") else "static")


def _symmetric_fp8(kind: dict[str, Any]) -> bool:
    return (kind.get("num_bits"), kind.get("type"), kind.get("symmetric", True)) == (8, "float", True)


def _require(data: dict[str, Any], key: str, allowed: tuple[Any, ...], default: Any) -> None:
    if data.get(key, default) not in allowed:
        shown = ", ".join(str(value).lower() for value in allowed)
        raise UserError(f'{_KEY}.{key} = "{data.get(key)}": must be {shown}')
