"""`moeforge plan serve`: what every GPU of a server holds, what is left for the KV cache, and how long steps take."""

from __future__ import annotations

import dataclasses
import json as json_format
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from moeforge.cli.output import Json, emit
from moeforge.errors import UserError

if TYPE_CHECKING:
    from moeforge.plan.serving_memory import Dtype


def serve(
    model: Annotated[str, typer.Argument(help="Preset, model directory or hub id.")],
    gpus: Annotated[
        str, typer.Option(metavar="SUM", help="8x4090, 4x4090+4x3090, 1xh200, ...; or a calibrated TOML file.")
    ],
    gpu_split: Annotated[
        str | None,
        typer.Option(metavar="A,B,...", help="A weight, or the memory, of each GPU; default: what each has to give."),
    ] = None,
    weights: Annotated[
        Literal["auto", "fp8", "bf16"], typer.Option(help="How weights are held; auto: as the model is stored.")
    ] = "auto",
    kv_cache_dtype: Annotated[
        Literal["auto", "fp8"], typer.Option(help="How keys and values are held; auto: as the model computes.")
    ] = "auto",
    max_model_len: Annotated[
        int | None, typer.Option(metavar="N", help="Most tokens of a sequence; default: the model's positions.")
    ] = None,
    max_num_seqs: Annotated[int, typer.Option(metavar="N", help="Most sequences that run at once.")] = 256,
    context: Annotated[
        int | None,
        typer.Option(metavar="N", help="Live tokens of each sequence in the steps that are timed; default 256."),
    ] = None,
    gpu_memory_utilization: Annotated[
        float, typer.Option(metavar="X", help="Share of a GPU's memory that the server may take.")
    ] = 0.95,
    out: Annotated[Path | None, typer.Option(help="Write the layout here, for `moeforge serve --plan`.")] = None,
    json: Json = False,
) -> None:
    """Plan a server before anything is loaded: weights, KV tokens and step time of every GPU, and whether it fits.

    Sizes need not divide: KV groups, columns and vocabulary rows are shared as evenly as they go, and what is left
    over takes turns from layer to layer.
    """
    from moeforge.cli.models import model_config
    from moeforge.config.gpus import load_gpus, parse_gpu_split
    from moeforge.config.serving import EngineConfig
    from moeforge.plan.serving import ONE_SCALE_EACH, ServingRequest, plan_serving
    from moeforge.plan.serving_summary import figures

    if context is not None and context < 1:
        raise UserError(f"--context {context}: must be at least 1")
    cards = load_gpus(gpus)
    engine = EngineConfig(
        tensor_parallel_size=len(cards),
        gpu_split=None if gpu_split is None else parse_gpu_split(gpu_split, len(cards)),
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        kv_cache_dtype=kv_cache_dtype,
        gpu_memory_utilization=gpu_memory_utilization,
    )
    config, dtype = model_config(model), _dtype(model)
    if weights == "bf16":
        config, dtype = dataclasses.replace(config, quantization=None), "bf16"
    elif weights == "fp8" and config.quantization is None:
        config = dataclasses.replace(config, quantization=ONE_SCALE_EACH)
    plan = plan_serving(ServingRequest(config, cards, engine, dtype, context))
    if out is not None:
        plan.layout.write(out)
    result = {
        "model": model,
        "gpus": gpus,
        "params_total": config.parameters(),
        "params_active": config.parameters(active=True),
        **figures(plan),
        "out": None if out is None else str(out),
    }

    def human() -> Any:
        from moeforge.cli.serve_tables import serving_report

        return serving_report(result)

    emit(result, json, human)


def _dtype(model: str) -> Dtype:
    """What the model is stored and computes in, as far as that can be served: presets in bf16, like the models that
    they are of; of an FP8 model what the rest of it is stored in."""
    from moeforge.config.presets import PRESETS
    from moeforge.config.section import expanded

    path = expanded(model)
    if model in PRESETS and not path.exists():
        return "bf16"
    if path.is_dir() and not any(list(path.glob(pattern)) for pattern in ("*.safetensors*", "*.bin*", "*.gguf")):
        data = json_format.loads((path / "config.json").read_text(encoding="utf-8"))
        name = str(data.get("dtype") or data.get("torch_dtype"))
    else:
        from moeforge.checkpoint import open_checkpoint
        from moeforge.checkpoint.inference import pick_dtype

        name = str(pick_dtype("auto", open_checkpoint(model))).removeprefix("torch.")
    dtypes: dict[str, Dtype] = {"float32": "fp32", "float64": "fp64"}
    return dtypes.get(name, "bf16")
