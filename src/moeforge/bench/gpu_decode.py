"""Decode steps of Skywork-MoE's real shape over random FP8 weights, as many layers as fit: one CUDA graph a step.

A step is what the serving engine captures, the model over paged keys and values with the last token's logits, and the
choice of the likeliest next token; scheduling and sampling on the host are left out. The floor of its time: all bytes
that it must read (weights of the experts in use, keys, values) at the rate of a copy.

Legend: B sequences, P pages, S positions, H heads, G KV groups, h head dimension, T tokens, K top-k, R expert rows.
"""

from __future__ import annotations

import statistics
import time
import traceback
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from moeforge.bench.gpu_layer import ceilings
from moeforge.config.model import ModelConfig, MoEConfig
from moeforge.config.presets import model_preset
from moeforge.config.quantization import QuantizationConfig
from moeforge.kernels.fp8 import E4M3
from moeforge.kernels.paged_attention import paged_attention_decode, write_pages
from moeforge.model import ForwardContext, LocalDispatcher, Transformer
from moeforge.model.dispatcher import ExpertFunction

BATCHES = (1, 8, 32, 64, 96)
LIVE_TOKENS = 256
PAGE = 16
_RESERVED_BYTES = 2**30
"""For activations, graphs and libraries."""
_STEPS = 20


def skywork(device: torch.device) -> ModelConfig:
    """The model with FP8 weights in blocks, activations as they are; on a CPU a tiny one."""
    config = model_preset("skywork-moe")
    if device.type == "cpu":
        moe = replace(config.moe, num_experts=4, expert_size=48) if config.moe else MoEConfig(4, 2, 48)
        config = replace(
            config, vocab_size=96, hidden_size=64, num_layers=3, num_heads=4, num_kv_heads=4, head_dim=16, moe=moe
        )
    return replace(config, quantization=QuantizationConfig("block128"))


class Pages:
    """Seam 2: `live` positions of each of B sequences, keys and values in pages; every step writes the last one."""

    def __init__(self, config: ModelConfig, batch: int, live: int, fp8: bool, device: torch.device) -> None:
        each = -(-live // PAGE)
        shape = (2, batch * each, PAGE, config.num_kv_heads, config.head_dim)
        dtype = torch.uint8 if fp8 else torch.bfloat16
        self.layers = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_layers)]
        self.table_BP = torch.arange(batch * each, device=device).view(batch, each)
        self.length_B = torch.full((batch,), live, device=device)
        self.slots_B = self.table_BP[:, -1] * PAGE + (live - 1) % PAGE

    def attend(self, layer: int, q_BHh: Tensor, k_BGh: Tensor, v_BGh: Tensor, window: int | None) -> Tensor:
        """Attention output [B, H, h] of the first B sequences."""
        pages, rows = self.layers[layer], len(q_BHh)
        write_pages(pages, self.slots_B[:rows], k_BGh, v_BGh)
        return paged_attention_decode(q_BHh, pages, self.table_BP[:rows], self.length_B[:rows], window)


class _Counting(LocalDispatcher):
    """Counts the experts that are used, summed over layers."""

    used = 0

    def route(
        self,
        layer: int,
        x_TD: Tensor,
        weights_TK: Tensor,
        experts_TK: Tensor,
        kept_TK: Tensor | None,
        num_experts: int,
        experts: ExpertFunction,
    ) -> Tensor:
        self.used += experts_TK.unique().numel()
        return super().route(layer, x_TD, weights_TK, experts_TK, kept_TK, num_experts, experts)


class DecodeBench:
    """A model of `config` on a device with pages for up to `batch` sequences."""

    def __init__(
        self, config: ModelConfig, batch: int, device: torch.device, live: int = LIVE_TOKENS, fp8_cache: bool = False
    ) -> None:
        self.config, self.device, self.live = config, device, live
        model = _dummy(config, device)
        sizes = {name: p.numel() * p.element_size() for name, p in model.named_parameters()}
        self.weight_bytes = sum(sizes.values())
        experts = sum(size for name, size in sizes.items() if ".experts." in name)
        assert config.moe is not None
        self.expert_bytes = experts / len(config.moe_layers) / config.moe.num_experts
        self.other_bytes = self.weight_bytes - experts - sizes["embed.weight"]
        self.model = model.prepare(live)
        self.pages = Pages(config, batch, live, fp8_cache, device)
        self.page_bytes = sum(layer.numel() * layer.element_size() for layer in self.pages.layers)
        self.batch = batch

    def step(self, tokens_B: Tensor, dispatcher: LocalDispatcher) -> Tensor:
        """The next token of each sequence."""
        context = ForwardContext(self.pages, dispatcher)
        hidden_BD = self.model(tokens_B, self.pages.length_B[: len(tokens_B)] - 1, context)
        return self.model.logits(hidden_BD, context).argmax(-1)

    @torch.inference_mode()
    def measure(self, batch: int, copied: float) -> dict[str, Any]:
        """Steps of `batch` sequences; `copied` bytes a second is what a copy reads and writes."""
        tokens_B = torch.randint(0, self.config.vocab_size, (batch,), device=self.device)
        counting = _Counting()
        self.step(tokens_B, counting)
        read = self.other_bytes + counting.used * self.expert_bytes + self.page_bytes * batch / self.batch
        captured = self.host_synchronisations == "none"
        run = self._captured(tokens_B) if captured else (lambda: self.step(tokens_B, LocalDispatcher()))
        times = []
        for _ in range(_STEPS + 3):
            self._wait()
            begin = time.perf_counter()
            run()
            self._wait()  # an engine waits for the tokens, too
            times.append(time.perf_counter() - begin)
        seconds = statistics.median(times[3:])
        return {
            "step_ms": 1e3 * seconds,
            "floor_ms": 1e3 * read / copied,
            "fraction_of_floor": read / copied / seconds,
            "read_gbytes": read / 1e9,
            "experts_used_per_layer": counting.used / len(self.config.moe_layers),
            "tokens_per_second": batch / seconds,
            "captured": captured,
        }

    def _captured(self, tokens_B: Tensor) -> Any:
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):  # what is compiled or prepared at a first call must not be captured
            self.step(tokens_B, LocalDispatcher())
        torch.cuda.current_stream(self.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.step(tokens_B, LocalDispatcher())
        return graph.replay

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    @cached_property
    @torch.inference_mode()
    def host_synchronisations(self) -> str:
        """Where a step first makes the host wait, or "none"."""
        if self.device.type != "cuda":
            return "not on a CPU"
        tokens_B = torch.zeros(self.batch, dtype=torch.int64, device=self.device)
        self.step(tokens_B, LocalDispatcher())  # what is compiled or prepared at a first call may wait
        torch.cuda.set_sync_debug_mode("error")
        try:
            self.step(tokens_B, LocalDispatcher())
        except RuntimeError:
            return traceback.format_exc()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return "none"


def _dummy(config: ModelConfig, device: torch.device) -> Transformer:
    """Random weights, made on the device."""
    with torch.device("meta"):
        model = Transformer(config)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            made = torch.empty_like(parameter, dtype=_stored(name, parameter), device=device)
            module.register_parameter(name, nn.Parameter(made, requires_grad=False))
    model.reset_parameters()
    return model


def _stored(name: str, parameter: Tensor) -> torch.dtype:
    return parameter.dtype if parameter.dtype == E4M3 or name.endswith("scales") else torch.bfloat16


def memory(config: ModelConfig, fp8_cache: bool) -> dict[str, float]:
    """GB of a layer's weights, of the weights at both ends, and of a sequence's keys and values in a layer."""
    with torch.device("meta"):
        model = Transformer(replace(config, num_layers=1))
    sizes = {name: p.numel() * _stored(name, p).itemsize for name, p in model.named_parameters()}
    layer = sum(size for name, size in sizes.items() if name.startswith("layers."))
    cache = 2 * LIVE_TOKENS * config.num_kv_heads * config.head_dim * (1 if fp8_cache else 2)
    return {"layer": layer / 1e9, "ends": (sum(sizes.values()) - layer) / 1e9, "sequence_in_a_layer": cache / 1e9}


def some_layers(device: torch.device) -> dict[str, Any]:
    """As many layers as leave room for all batch sizes, with keys and values in bf16."""
    config = skywork(device)
    sizes, free = memory(config, fp8_cache=False), _free(device)
    each = sizes["layer"] + sizes["sequence_in_a_layer"] * BATCHES[-1]
    layers = min(config.num_layers, int((free - sizes["ends"]) / each))
    if layers < 1:
        return {"skipped": f"a layer and the ends take {sizes['ends'] + each:.1f} GB, and {free:.1f} GB are free"}
    return _measured(replace(config, num_layers=layers), BATCHES, device, False)


def all_layers(device: torch.device) -> dict[str, Any]:
    """The whole model, at the batch sizes for which there is memory, with keys and values in FP8."""
    config = skywork(device)
    sizes, free = memory(config, fp8_cache=True), _free(device)
    weights = sizes["layer"] * config.num_layers + sizes["ends"]
    left = (free - weights) / (sizes["sequence_in_a_layer"] * config.num_layers)
    batches = tuple(batch for batch in BATCHES if batch <= left)
    if not batches:
        return {"skipped": f"all {config.num_layers} layers take {weights:.1f} GB, and {free:.1f} GB are free"}
    return _measured(config, batches, device, True)


def _free(device: torch.device) -> float:
    """GB that may be taken."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 4 * _RESERVED_BYTES
    return (free - _RESERVED_BYTES) / 1e9


def _measured(config: ModelConfig, batches: tuple[int, ...], device: torch.device, fp8_cache: bool) -> dict[str, Any]:
    copied = ceilings(device)["copy_gbytes_per_second"] * 1e9
    bench = DecodeBench(config, batches[-1], device, fp8_cache=fp8_cache)
    result: dict[str, Any] = {
        "layers": config.num_layers,
        "live_tokens": LIVE_TOKENS,
        "copy_gbytes_per_second": copied / 1e9,
        "memory_gbytes": {
            **memory(config, fp8_cache),
            "weights": bench.weight_bytes / 1e9,
            "keys and values": bench.page_bytes / 1e9,
            **({"free": torch.cuda.mem_get_info(device)[0] / 1e9} if device.type == "cuda" else {}),
        },
        "host_synchronisations": bench.host_synchronisations,
    }
    for batch in batches:
        result[f"{batch} sequences"] = bench.measure(batch, copied)
    return result
