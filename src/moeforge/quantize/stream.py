"""A checkpoint in, its FP8 form out: one weight read, one weight written."""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moeforge.checkpoint import Checkpoint, ShardWriter, canonical_shapes, check_finite, require_disk_space
from moeforge.checkpoint.fp8_scales import INPUT_SCALE, WEIGHT_SCALE, input_shape
from moeforge.checkpoint.inference import pick_dtype
from moeforge.checkpoint.writer import SHARD_BYTES, partial_directory, require_free_directory
from moeforge.config.model import ModelConfig
from moeforge.config.quantization import QuantizationConfig, matrices
from moeforge.errors import UserError
from moeforge.kernels.fp8 import E4M3_MAX
from moeforge.quantize.calibrate import Observed
from moeforge.quantize.gptq import Feedbacks
from moeforge.quantize.weight import quantize_weight, relative_error


@dataclass(frozen=True)
class QuantizeResult:
    """What was made: bytes of all weights before (of a GGUF file, the file's) and after, scales included.

    `errors`: of every quantised weight by canonical name, the Frobenius norm of what changed over that of the weight.
    """

    path: Path
    config: ModelConfig
    bytes_before: int
    bytes_after: int
    errors: dict[str, float]
    seconds: float

    def worst(self, count: int = 10) -> dict[str, float]:
        """The largest errors, the largest first."""
        return dict(sorted(self.errors.items(), key=lambda error: -error[1])[:count])


def quantize(
    source: Checkpoint,
    out: str | Path,
    quantization: QuantizationConfig,
    inputs: Mapping[str, float] | None = None,
    progress: Callable[[int, int], None] | None = None,
    shard_bytes: int = SHARD_BYTES,
    observed: Generator[Observed, None, None] | None = None,
) -> QuantizeResult:
    """Writes `source` with FP8 weights as the model directory `out`, which appears when it is complete.

    `inputs`: what `calibrate` found, for static activations. `observed`: what `observe` gives, for values found by
    GPTQ; without it they are the nearest. Weights that stay are written as stored; those of a GGUF file, which come
    dequantised, in bf16. `progress` is called with (weights done, weights in all).

    Raises UserError for a source that is quantised already or not finite, and for an `out` in use; RunError where the
    disk is too small or gets full; what `observe` does.
    """
    begin = time.monotonic()
    require_unquantized(source)
    out = Path(out)
    require_free_directory(out)
    config = dataclasses.replace(source.config, quantization=quantization)
    from_gguf = source.path.suffix == ".gguf"
    kept_dtype = pick_dtype("auto", source) if from_gguf else None
    shapes = canonical_shapes(config)
    sizes = {name: _bytes(shape, _stored(source, name, kept_dtype, shapes)) for name, shape in shapes.items()}
    require_disk_space(out, sum(sizes.values()))
    fixed = _input_scales(config, inputs) if quantization.activations == "static" else {}
    places = _places(config)
    unit: Observed = {}
    feedbacks = Feedbacks()
    errors: dict[str, float] = {}
    shutil.rmtree(partial_directory(out), ignore_errors=True)  # of a killed run
    writer = ShardWriter(out, config, shard_bytes, job="quantize")
    try:
        source.copy_tokenizer(writer.partial)
        for done, name in enumerate(source.names, 1):
            weight, module = source.tensor(name), name.removesuffix(".weight")
            check_finite(f"{source.path}: {name}", weight)
            if module + WEIGHT_SCALE not in shapes:
                writer.add(name, weight.to(kept_dtype or weight.dtype))
            else:
                known = None
                if observed is not None:
                    matrix, index = places[module]
                    while matrix not in unit:
                        unit = next(observed)  # units come in the order of the weights
                    samples = unit[matrix][index]
                    known, weight = feedbacks.of(samples), weight.to(samples.device)
                values, scales = quantize_weight(weight, quantization.scales, known)
                errors[name] = relative_error(weight, values, scales, quantization.scales)
                writer.add(name, values.cpu())
                writer.add(module + WEIGHT_SCALE, scales.cpu())
                if module in fixed:
                    writer.add(module + INPUT_SCALE, fixed[module])
            if progress is not None:
                progress(done, len(source.names))
        writer.finish()
    except BaseException:  # nothing is gone on with
        shutil.rmtree(writer.partial, ignore_errors=True)
        raise
    finally:
        if observed is not None:
            observed.close()  # and with it the unit in memory
    before = source.path.stat().st_size if from_gguf else 0
    before = before or sum(_bytes(source.shape(name), source.dtype(name)) for name in source.names)
    return QuantizeResult(out, config, before, sum(sizes.values()), errors, time.monotonic() - begin)


def require_unquantized(source: Checkpoint) -> None:
    """Raises UserError for a checkpoint that has FP8 weights."""
    if source.config.quantization is not None:
        raise UserError(f"{source.path}: is FP8 already; quantise the checkpoint that it was made of")


def _stored(
    source: Checkpoint, name: str, kept_dtype: torch.dtype | None, shapes: Mapping[str, tuple[int, ...]]
) -> torch.dtype:
    if name.endswith((WEIGHT_SCALE, INPUT_SCALE)):
        return torch.float32
    if name.removesuffix(".weight") + WEIGHT_SCALE in shapes:
        return torch.float8_e4m3fn
    return kept_dtype or source.dtype(name)


def _bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return torch.Size(shape).numel() * dtype.itemsize


def _places(config: ModelConfig) -> dict[str, tuple[str, int]]:
    """By module that is FP8: what `observe` calls the inputs of its matrix, and at which index they are."""
    places = {}
    for matrix, modules in matrices(config).items():
        for module in modules if config.fp8(matrix) else ():
            part = {"w1": ".w13", "w3": ".w13", "w2": ".w2"}.get(module.rpartition(".")[2])
            places[module] = (matrix, 0) if part is None else (matrix + part, int(module.split(".")[-2]))
    return places


def _input_scales(config: ModelConfig, inputs: Mapping[str, float] | None) -> dict[str, Tensor]:
    """By module: what its inputs are divided by. Inputs that were all zero say nothing: 1."""
    if inputs is None:
        raise ValueError("static activations need what calibrate found")
    assert config.quantization is not None
    shape = input_shape(config.quantization.scales)
    return {
        module: torch.tensor(inputs[matrix] / E4M3_MAX or 1.0).reshape(shape)
        for module, (matrix, _) in _places(config).items()
    }
