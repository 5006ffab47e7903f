"""The names of weights: canonical (unfused, as on disk) and in memory (fused q/k/v, gate/up, experts).

Legend: D hidden, F FFN width, E experts, H heads, G KV groups, V vocabulary, hd head dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from moeforge.checkpoint.fp8_scales import INPUT_SCALE, WEIGHT_SCALE, disk_shape, input_shape
from moeforge.config.model import ModelConfig
from moeforge.config.quantization import QuantizationConfig, matrices

Shape = tuple[int, ...]
EMBED = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


def canonical_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Every canonical name of this model with its shape, in the order in which checkpoints are written."""
    c = config
    d, q_rows, kv_rows = c.hidden_size, c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    shapes: dict[str, Shape] = {EMBED: (c.vocab_size, d)}
    for i in range(c.num_layers):
        layer = f"model.layers.{i}"
        shapes[f"{layer}.input_layernorm.weight"] = (d,)
        for part, rows in (("q", q_rows), ("k", kv_rows), ("v", kv_rows)):
            shapes[f"{layer}.self_attn.{part}_proj.weight"] = (rows, d)
            if c.qkv_bias:
                shapes[f"{layer}.self_attn.{part}_proj.bias"] = (rows,)
        shapes[f"{layer}.self_attn.o_proj.weight"] = (d, q_rows)
        if c.output_bias:
            shapes[f"{layer}.self_attn.o_proj.bias"] = (d,)
        if c.qk_norm != "none":
            full = c.qk_norm == "full"
            shapes[f"{layer}.self_attn.q_norm.weight"] = (q_rows if full else c.head_dim,)
            shapes[f"{layer}.self_attn.k_norm.weight"] = (kv_rows if full else c.head_dim,)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (d,)
        if c.moe is not None and c.is_moe_layer(i):
            block = f"{layer}.block_sparse_moe"
            shapes[f"{block}.gate.weight"] = (c.moe.num_experts, d)
            if c.moe.router_bias:
                shapes[f"{block}.gate.bias"] = (c.moe.num_experts,)
            if c.moe.gate_norm_learned:
                shapes[f"{block}.gate.scale"] = ()
            for e in range(c.moe.num_experts):
                shapes[f"{block}.experts.{e}.w1.weight"] = (c.moe.expert_size, d)
                shapes[f"{block}.experts.{e}.w3.weight"] = (c.moe.expert_size, d)
                shapes[f"{block}.experts.{e}.w2.weight"] = (d, c.moe.expert_size)
        else:
            shapes[f"{layer}.mlp.gate_proj.weight"] = (c.ffn_size, d)
            shapes[f"{layer}.mlp.up_proj.weight"] = (c.ffn_size, d)
            shapes[f"{layer}.mlp.down_proj.weight"] = (d, c.ffn_size)
    shapes["model.norm.weight"] = (d,)
    if not c.tie_embeddings:
        shapes[HEAD] = (c.vocab_size, d)
    return shapes if c.quantization is None else _with_scales(c, c.quantization, shapes)


def _with_scales(config: ModelConfig, quantization: QuantizationConfig, shapes: dict[str, Shape]) -> dict[str, Shape]:
    fp8 = {
        f"{module}.weight"
        for matrix, modules in matrices(config).items()
        if matrix not in quantization.kept
        for module in modules
    }
    scaled: dict[str, Shape] = {}
    for name, shape in shapes.items():
        scaled[name] = shape
        if name in fp8:
            module = name.removesuffix(".weight")
            scaled[module + WEIGHT_SCALE] = disk_shape(shape, quantization.scales)
            if quantization.activations == "static":
                scaled[module + INPUT_SCALE] = input_shape(quantization.scales)
    return scaled


_RENAMED = {
    "attention.norm.weight": "input_layernorm.weight",
    "attention.q_norm.weight": "self_attn.q_norm.weight",
    "attention.k_norm.weight": "self_attn.k_norm.weight",
    "attention.o.weight": "self_attn.o_proj.weight",
    "attention.o.scales": "self_attn.o_proj.weight_scale",
    "attention.o.input_scale": "self_attn.o_proj.input_scale",
    "attention.o.bias": "self_attn.o_proj.bias",
    "ffn.norm.weight": "post_attention_layernorm.weight",
    "ffn.router.weight": "block_sparse_moe.gate.weight",
    "ffn.router.bias": "block_sparse_moe.gate.bias",
    "ffn.router.scale": "block_sparse_moe.gate.scale",
    "ffn.w2.weight": "mlp.down_proj.weight",
    "ffn.w2.scales": "mlp.down_proj.weight_scale",
    "ffn.w2.input_scale": "mlp.down_proj.input_scale",
}
_KINDS = {"weight": "weight", "bias": "bias", "scales": "weight_scale", "input_scale": "input_scale"}
_ENDS = {"embed.weight": EMBED, "head.norm.weight": "model.norm.weight", "head.weight": HEAD}


def fused_names(config: ModelConfig) -> Iterator[str]:
    """Every in-memory name of this model, in the order of its units."""
    c = config

    def scales(matrix: str, prefix: str) -> Iterator[str]:
        if (fp8 := c.fp8(matrix)) is not None:
            yield f"{prefix}scales"
            if fp8.activations == "static":
                yield f"{prefix}input_scale"

    yield "embed.weight"
    for i in range(c.num_layers):
        attention, ffn = f"layers.{i}.attention", f"layers.{i}.ffn"
        yield f"{attention}.norm.weight"
        yield f"{attention}.qkv.weight"
        yield from scales(f"{attention}.qkv", f"{attention}.qkv.")
        if c.qkv_bias:
            yield f"{attention}.qkv.bias"
        if c.qk_norm != "none":
            yield f"{attention}.q_norm.weight"
            yield f"{attention}.k_norm.weight"
        yield f"{attention}.o.weight"
        yield from scales(f"{attention}.o", f"{attention}.o.")
        if c.output_bias:
            yield f"{attention}.o.bias"
        yield f"{ffn}.norm.weight"
        if c.moe is not None and c.is_moe_layer(i):
            yield f"{ffn}.router.weight"
            if c.moe.router_bias:
                yield f"{ffn}.router.bias"
            if c.moe.gate_norm_learned:
                yield f"{ffn}.router.scale"
            for part in ("w13", "w2"):
                yield f"{ffn}.experts.{part}"
                yield from scales(f"{ffn}.experts", f"{ffn}.experts.{part}_")
        else:
            for part in ("w13", "w2"):
                yield f"{ffn}.{part}.weight"
                yield from scales(f"{ffn}.{part}", f"{ffn}.{part}.")
    yield "head.norm.weight"
    if not c.tie_embeddings:
        yield "head.weight"


def fused_weight(
    config: ModelConfig, name: str, tensor: Callable[[str], Tensor], experts: tuple[int, int] | None = None
) -> Tensor:
    """The weight of an in-memory name; `tensor` gives the weight of a canonical one.

    Rows of q, k and v are regrouped by KV group: a group's query heads, its key head, its value head. Of stacked
    experts only those of the range `experts` (None: all) are asked for. Fused weights are new tensors, others what
    `tensor` returned. Scales are fused like the rows of the weights: for `NAME.weight_scale`, `tensor` gives those of
    every row (`fp8_scales.row_scales`). Input scales of what is fused: the largest.
    """
    if name in _ENDS:
        return tensor(_ENDS[name])
    _, layer, part = name.split(".", 2)
    source = f"model.layers.{layer}"
    if part in _RENAMED:
        return tensor(f"{source}.{_RENAMED[part]}")
    kind = part.rpartition(".")[2]
    if part.startswith("attention.qkv."):
        parts = [tensor(f"{source}.self_attn.{letter}_proj.{_KINDS[kind]}") for letter in "qkv"]
        if kind == "input_scale":
            return torch.stack(parts).amax()
        grouped = [rows.unflatten(0, (config.num_kv_heads, -1)) for rows in parts]
        return torch.cat(grouped, dim=1).flatten(0, 1)
    if part.startswith("ffn.w13."):
        parts = [tensor(f"{source}.mlp.{half}_proj.{_KINDS[kind]}") for half in ("gate", "up")]
        return torch.stack(parts).amax() if kind == "input_scale" else torch.cat(parts)
    assert config.moe is not None, name
    fused, _, kind = part.removeprefix("ffn.experts.").partition("_")
    modules = {"w13": ("w1", "w3"), "w2": ("w2",)}[fused]
    every, block = range(config.moe.num_experts), f"{source}.block_sparse_moe"
    if kind == "input_scale":
        return torch.stack(
            [tensor(f"{block}.experts.{e}.{module}.input_scale") for e in every for module in modules]
        ).amax()
    return _stack_experts(range(*experts) if experts else every, block, modules, _KINDS[kind or "weight"], tensor)


def fuse(config: ModelConfig, tensor: Callable[[str], Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield (in-memory name, weight) for the whole model, one weight at a time, as `fused_weight` makes it."""
    for name in fused_names(config):
        yield name, fused_weight(config, name, tensor)


def _stack_experts(
    experts: range, block: str, parts: tuple[str, ...], kind: str, tensor: Callable[[str], Tensor]
) -> Tensor:
    """[e, rows of all parts, columns] of at least one expert, filled one expert at a time."""
    stacked: Tensor | None = None
    for index, e in enumerate(experts):
        expert = [tensor(f"{block}.experts.{e}.{part}.{kind}") for part in parts]
        if stacked is None:
            stacked = expert[0].new_empty(len(experts), sum(len(part) for part in expert), expert[0].shape[1])
        torch.cat(expert, out=stacked[index])
    assert stacked is not None
    return stacked


def unfuse(config: ModelConfig, tensor: Callable[[str], Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield (canonical name, weight): the inverse of `fuse`, of models without FP8 weights; `tensor` gives the weight
    of an in-memory name.

    Weights are views of what `tensor` returned, except q, k and v, which are copied into contiguous rows.
    """
    c = config
    yield EMBED, tensor("embed.weight")
    heads = [c.heads_per_group * c.head_dim, c.head_dim, c.head_dim]
    for i in range(c.num_layers):
        target, attention, ffn = f"model.layers.{i}", f"layers.{i}.attention", f"layers.{i}.ffn"
        yield f"{target}.input_layernorm.weight", tensor(f"{attention}.norm.weight")
        for kind in ("weight", "bias") if c.qkv_bias else ("weight",):
            grouped = tensor(f"{attention}.qkv.{kind}").unflatten(0, (c.num_kv_heads, -1))
            for part, rows in zip("qkv", grouped.split(heads, dim=1), strict=True):
                yield f"{target}.self_attn.{part}_proj.{kind}", rows.flatten(0, 1)
        yield f"{target}.self_attn.o_proj.weight", tensor(f"{attention}.o.weight")
        if c.output_bias:
            yield f"{target}.self_attn.o_proj.bias", tensor(f"{attention}.o.bias")
        if c.qk_norm != "none":
            yield f"{target}.self_attn.q_norm.weight", tensor(f"{attention}.q_norm.weight")
            yield f"{target}.self_attn.k_norm.weight", tensor(f"{attention}.k_norm.weight")
        yield f"{target}.post_attention_layernorm.weight", tensor(f"{ffn}.norm.weight")
        if c.moe is not None and c.is_moe_layer(i):
            block = f"{target}.block_sparse_moe"
            yield f"{block}.gate.weight", tensor(f"{ffn}.router.weight")
            if c.moe.router_bias:
                yield f"{block}.gate.bias", tensor(f"{ffn}.router.bias")
            if c.moe.gate_norm_learned:
                yield f"{block}.gate.scale", tensor(f"{ffn}.router.scale")
            w13, w2 = tensor(f"{ffn}.experts.w13"), tensor(f"{ffn}.experts.w2")
            for e in range(c.moe.num_experts):
                gate, up = w13[e].chunk(2)
                yield f"{block}.experts.{e}.w1.weight", gate
                yield f"{block}.experts.{e}.w3.weight", up
                yield f"{block}.experts.{e}.w2.weight", w2[e]
        else:
            gate, up = tensor(f"{ffn}.w13.weight").chunk(2)
            yield f"{target}.mlp.gate_proj.weight", gate
            yield f"{target}.mlp.up_proj.weight", up
            yield f"{target}.mlp.down_proj.weight", tensor(f"{ffn}.w2.weight")
    yield "model.norm.weight", tensor("head.norm.weight")
    if not c.tie_embeddings:
        yield HEAD, tensor("head.weight")
