"""Settings of the serving engine; names are vLLM's where it has the same thing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from moeforge.errors import UserError

KVDtype = Literal["auto", "fp8"]
LoadFormat = Literal["auto", "dummy"]


@dataclass(frozen=True)
class EngineConfig:
    """How a model is loaded and served.

    dtype                    auto (as stored; bf16 for GGUF), bf16, fp32 or fp64
    device                   auto (a GPU if there is one) or a torch device
    load_format              auto, or dummy: random weights, nothing is read but the configuration
    skip_tokenizer_init      serve token ids only
    tensor_parallel_size     processes that share every layer; need not divide anything
    gpu_split                a weight (or the memory) of each of them; None: equal
    plan                     a layout that `moeforge plan serve` wrote, instead of both
    max_model_len            most positions of prompt and continuation together; None: what the model was made for
    max_num_seqs             most sequences that run at once
    max_num_batched_tokens   most tokens of one step: longer prompts are prefilled in chunks
    max_waiting              most requests that wait for a place; further ones are refused
    block_size               positions of a page of the KV cache
    kv_cache_dtype           auto (as the model computes) or fp8 (e4m3, saturating, scale 1)
    kv_cache_memory_bytes    for the pages of one rank; None: what `gpu_memory_utilization` leaves (CPU: at most 4 GiB)
    gpu_memory_utilization   share of a GPU's memory that weights, pages and activations may take
    enable_prefix_caching    reuse pages of equal beginnings
    deterministic            the same bits for a request alone or batched, cached or not (slower)

    Raises UserError for a value outside its range.
    """

    dtype: str = "auto"
    device: str = "auto"
    load_format: LoadFormat = "auto"
    skip_tokenizer_init: bool = False
    tensor_parallel_size: int = 1
    gpu_split: tuple[float, ...] | None = None
    plan: Path | None = None
    max_model_len: int | None = None
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    max_waiting: int = 1024
    block_size: int = 16
    kv_cache_dtype: KVDtype = "auto"
    kv_cache_memory_bytes: int | None = None
    gpu_memory_utilization: float = 0.95
    enable_prefix_caching: bool = True
    deterministic: bool = False

    def __post_init__(self) -> None:
        at_least_one = (
            "tensor_parallel_size",
            "max_num_seqs",
            "max_num_batched_tokens",
            "max_waiting",
            "block_size",
            "max_model_len",
            "kv_cache_memory_bytes",
        )
        for name in at_least_one:
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise UserError(f"{name} = {value}: must be a whole number, at least 1")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise UserError(f"gpu_memory_utilization = {self.gpu_memory_utilization}: must be above 0 and at most 1")
        for name, allowed in (("kv_cache_dtype", ("auto", "fp8")), ("load_format", ("auto", "dummy"))):
            if getattr(self, name) not in allowed:
                raise UserError(f"{name} = {getattr(self, name)!r}: must be one of {', '.join(allowed)}")
        split = self.gpu_split
        if split is not None and (len(split) != self.tensor_parallel_size or min(split) < 0 or not any(split)):
            shown = ",".join(f"{part:g}" for part in split)
            raise UserError(
                f"gpu_split = {shown}: must have one number for each of the {self.tensor_parallel_size} ranks, "
                "at least 0 each and not all 0"
            )
