"""What would make a model fit that does not: the smallest sets of changes, and the smallest number of GPUs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from itertools import combinations
from typing import Any, NamedTuple

from moeforge.config.gpus import MOST_GPUS, describe_gpus
from moeforge.errors import UserError
from moeforge.plan.serving import ONE_SCALE_EACH, ServingRequest, plan_serving
from moeforge.plan.serving_memory import kv_token_bytes, replicated_bytes
from moeforge.plan.serving_shards import ServingShard

_SHORTEST = 256
"""Sequences shorter than this are no remedy."""


class Remedy(NamedTuple):
    """Options that make the model fit, and the KV tokens that there are then."""

    options: str
    kv_tokens: int


def remedies(request: ServingRequest) -> tuple[Remedy, ...]:
    """For a request that does not fit: the smallest sets of options with which it does (shorter sequences where they
    still have to be), and more GPUs."""
    return (*_options(request), *_more_gpus(request))


def _options(request: ServingRequest) -> list[Remedy]:
    changes = _changes(request)
    for size in range(len(changes) + 1):
        found = []
        for names in combinations(changes, size):
            changed = request
            for name in names:
                changed = changes[name](changed)
            plan = plan_serving(changed)
            shorter = () if plan.fits else (f"--max-model-len {plan.kv_tokens}",)
            if plan.fits or plan.kv_tokens >= min(_SHORTEST, request.max_model_len):
                found.append(Remedy(" ".join((*names, *shorter)), plan.kv_tokens))
        if found:
            return found
    return []


def _changes(request: ServingRequest) -> dict[str, Callable[[ServingRequest], ServingRequest]]:
    engine = request.engine
    found: dict[str, Callable[[ServingRequest], ServingRequest]] = {}
    if request.model.quantization is None:
        quantized = dataclasses.replace(request.model, quantization=ONE_SCALE_EACH)
        found["--weights fp8"] = lambda r: dataclasses.replace(r, model=quantized)
    if engine.kv_cache_dtype != "fp8":
        found["--kv-cache-dtype fp8"] = lambda r: _engine(r, kv_cache_dtype="fp8")
    if engine.gpu_memory_utilization < 1:
        found["--gpu-memory-utilization 1"] = lambda r: _engine(r, gpu_memory_utilization=1.0)
    if engine.gpu_split is not None:
        found["no --gpu-split"] = lambda r: _engine(r, gpu_split=None)
    return found


def _engine(request: ServingRequest, **changes: Any) -> ServingRequest:
    return dataclasses.replace(request, engine=dataclasses.replace(request.engine, **changes))


def _more_gpus(request: ServingRequest) -> list[Remedy]:
    """More of the first kind."""
    model, stored, first = request.model, request.stored, request.usable[0]
    fixed = replicated_bytes(model, stored)
    whole = ServingShard(((0, model.num_kv_heads),) * model.num_layers, (), 0)
    narrowest = stored.other if model.quantization is None else 1
    # At least this once, and on every further rank what is whole there.
    needed = model.parameters() * narrowest + request.max_model_len * kv_token_bytes(model, whole, stored)
    for count in range(len(request.gpus) + 1, MOST_GPUS + 1):
        more = count - len(request.gpus)
        if sum(request.usable) + more * first < needed + (count - 1) * fixed:
            continue  # too little even if it were one memory
        gpus = (request.gpus[0],) * more + request.gpus
        wider = _engine(dataclasses.replace(request, gpus=gpus), tensor_parallel_size=count, gpu_split=None)
        try:
            plan = plan_serving(wider)
        except UserError:  # more ranks than columns
            return []
        if plan.fits:
            return [Remedy(f"--gpus {describe_gpus(gpus)}", plan.kv_tokens)]
    return []
