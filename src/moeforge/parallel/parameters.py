"""The parameter table: for every parameter of a rank, which part of the global tensor it is and over whom its gradient
is summed. Gradient reduction, ZeRO, the norm and checkpoints all go by it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from moeforge.config.model import ModelConfig
from moeforge.kernels.fp8 import E4M3
from moeforge.kernels.fp8_weight import GROUP_ROWS
from moeforge.layout import Layout, unit_names
from moeforge.model.fp8 import Fp8Matrix
from moeforge.parallel.mesh import tied_ranks

Reduce = Literal["dp", "dp_tp", "expert_dp"]
Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Offset and size, one number a dimension."""


@dataclass(frozen=True)
class ParameterPart:
    """A rank's part of a global tensor.

    `view` is the global tensor's shape, seen so that the part is one box at `offset` of `size` (fused gate and up rows
    [2F, D] as [2, F, D]). `reduce` names the group of ranks with the same part, over which gradients are summed and
    ZeRO divides the state. `tied`: another stage holds a copy too. `dtype`: None for the model's. Of the scales of
    FP8 weights, which only inference holds, `view` has a row for each row of the weight; `shape` may have one for 16.
    """

    name: str
    view: tuple[int, ...]
    offset: tuple[int, ...]
    size: tuple[int, ...]
    shape: tuple[int, ...]
    reduce: Reduce
    tied: bool = False
    dtype: torch.dtype | None = None

    @property
    def numel(self) -> int:
        """Elements of the part."""
        return math.prod(self.shape)

    def cut(self, whole: Tensor) -> Tensor:
        """This part of a global tensor, in the module's shape."""
        box = whole.reshape(self.view)
        for dim, (begin, length) in enumerate(zip(self.offset, self.size, strict=True)):
            box = box.narrow(dim, begin, length)
        return box.reshape(self.shape)

    def place(self, whole: Tensor, part: Tensor) -> None:
        """Write this part into a contiguous global tensor: the inverse of `cut`."""
        box = whole.view(self.view)
        for dim, (begin, length) in enumerate(zip(self.offset, self.size, strict=True)):
            box = box.narrow(dim, begin, length)
        box.copy_(part.reshape(self.size))


def parameter_parts(
    config: ModelConfig, layout: Layout, stage: int, tp_rank: int, expert_rank: int
) -> dict[str, ParameterPart]:
    """Every parameter of `Transformer(config, layout, stage, tp_rank, expert_rank)`, by name."""
    part = layout.stages[stage]
    names = unit_names(config)[part.begin_unit : part.end_unit]
    table = _Table(config, layout, tp_rank, expert_rank)
    for name in names:
        if name == "embed":
            table.embedding()
        elif name == "head":
            table.head("embed" in names)
        elif name.endswith(".attention"):
            table.attention(name, int(name.split(".")[1]))
        else:
            table.feed_forward(name, int(name.split(".")[1]))
    return table.parts


class _Table:
    def __init__(self, config: ModelConfig, layout: Layout, tp_rank: int, expert_rank: int) -> None:
        self.config, self.layout = config, layout
        self.shard, self.experts = layout.ranks[tp_rank], layout.expert_ranks[expert_rank]
        self.tied = config.tie_embeddings and len(tied_ranks(layout)) == 2
        self.parts: dict[str, ParameterPart] = {}

    def add(
        self,
        name: str,
        view: tuple[int, ...],
        ranges: dict[int, tuple[int, int]],
        reduce: Reduce,
        shape: tuple[int, ...] | None = None,
        tied: bool = False,
    ) -> None:
        """A part that is cut to `ranges` in some dimensions of `view`, and whole in the others."""
        offset = tuple(ranges.get(dim, (0, 0))[0] for dim in range(len(view)))
        size = tuple(ranges[d][1] - ranges[d][0] if d in ranges else length for d, length in enumerate(view))
        self.parts[name] = ParameterPart(name, view, offset, size, shape or size, reduce, tied)

    def fp8(self, prefix: str, weight: str, matrix: Fp8Matrix | None) -> None:
        """Makes the part `weight` one of e4m3, and adds those of its scales, whose names begin with `prefix`."""
        if matrix is None:
            return
        part = self.parts[weight]
        self.parts[weight] = dataclasses.replace(part, dtype=E4M3)
        *stack, rows, columns = part.shape
        begin, end = matrix.block_range(columns)
        scales = dataclasses.replace(
            part,
            name=f"{prefix}scales",
            view=(*part.view[:-1], matrix.block_range(part.view[-1] - matrix.first_column)[1]),
            offset=(*part.offset[:-1], begin),
            size=(*part.size[:-1], end - begin),
            shape=(*stack, *matrix.scales_shape(rows, columns)),
            dtype=torch.float32,
        )
        self.parts[scales.name] = scales
        if matrix.activations == "static":
            name = f"{prefix}input_scale"
            self.parts[name] = ParameterPart(name, (), (), (), (), part.reduce, dtype=torch.float32)

    def replicated(self, name: str, *shape: int) -> None:
        self.add(name, shape, {}, "dp_tp")

    def embedding(self) -> None:
        view = (self.config.vocab_size, self.config.hidden_size)
        self.add("embed.weight", view, {0: self.shard.vocab_rows}, "dp", tied=self.tied)

    def head(self, with_embedding: bool) -> None:
        self.replicated("head.norm.weight", self.config.hidden_size)
        if self.config.tie_embeddings:
            if not with_embedding:
                self.embedding()
            return
        view = (self.config.vocab_size, self.config.hidden_size)
        self.add("head.weight", view, {0: self.shard.vocab_rows}, "dp")

    def attention(self, name: str, layer: int) -> None:
        c = self.config
        d, h, per_group = c.hidden_size, c.head_dim, c.heads_per_group
        begin, end = self.shard.kv_groups[layer]

        def heads(number: int) -> tuple[int, int]:
            """Rows of this rank's KV groups, `number` heads each."""
            return begin * number * h, end * number * h

        self.replicated(f"{name}.norm.weight", d)
        rows = c.num_kv_heads * (per_group + 2) * h
        self.add(f"{name}.qkv.weight", (rows, d), {0: heads(per_group + 2)}, "dp")
        self.fp8(f"{name}.qkv.", f"{name}.qkv.weight", Fp8Matrix.of(c.fp8(f"{name}.qkv"), aligned=h % GROUP_ROWS == 0))
        if c.qkv_bias:
            self.add(f"{name}.qkv.bias", (rows,), {0: heads(per_group + 2)}, "dp")
        if c.qk_norm == "head":
            self.replicated(f"{name}.q_norm.weight", h)
            self.replicated(f"{name}.k_norm.weight", h)
        elif c.qk_norm == "full":
            self.add(f"{name}.q_norm.weight", (c.num_heads * h,), {0: heads(per_group)}, "dp")
            self.add(f"{name}.k_norm.weight", (c.num_kv_heads * h,), {0: heads(1)}, "dp")
        self.add(f"{name}.o.weight", (d, c.num_heads * h), {1: heads(per_group)}, "dp")
        self.fp8(f"{name}.o.", f"{name}.o.weight", Fp8Matrix.of(c.fp8(f"{name}.o"), heads(per_group)[0]))
        if c.output_bias:
            self.replicated(f"{name}.o.bias", d)

    def feed_forward(self, name: str, layer: int) -> None:
        c = self.config
        d = c.hidden_size
        self.replicated(f"{name}.norm.weight", d)
        if c.moe is None or not c.is_moe_layer(layer):
            begin, end = self.shard.ffn_columns[layer]
            gate_up = (2 * (end - begin), d)
            self.add(f"{name}.w13.weight", (2, c.ffn_size, d), {1: (begin, end)}, "dp", gate_up)
            self.add(f"{name}.w2.weight", (d, c.ffn_size), {1: (begin, end)}, "dp")
            aligned = math.gcd(begin, end) % GROUP_ROWS == 0
            self.fp8(f"{name}.w13.", f"{name}.w13.weight", Fp8Matrix.of(c.fp8(f"{name}.w13"), aligned=aligned))
            self.fp8(f"{name}.w2.", f"{name}.w2.weight", Fp8Matrix.of(c.fp8(f"{name}.w2"), begin))
            return
        e, f = c.moe.num_experts, c.moe.expert_size
        self.replicated(f"{name}.router.weight", e, d)
        if c.moe.router_bias:
            self.replicated(f"{name}.router.bias", e)
        if c.moe.gate_norm_learned:
            self.replicated(f"{name}.router.scale")
        held, (begin, end) = self.experts.experts[layer], self.experts.columns[layer]
        count = held[1] - held[0]
        stacked = (count, 2 * (end - begin), d)
        self.add(f"{name}.experts.w13", (e, 2, f, d), {0: held, 2: (begin, end)}, "expert_dp", stacked)
        self.add(f"{name}.experts.w2", (e, d, f), {0: held, 2: (begin, end)}, "expert_dp")
        fp8, aligned = c.fp8(f"{name}.experts"), math.gcd(begin, end) % GROUP_ROWS == 0
        self.fp8(f"{name}.experts.w13_", f"{name}.experts.w13", Fp8Matrix.of(fp8, aligned=aligned))
        self.fp8(f"{name}.experts.w2_", f"{name}.experts.w2", Fp8Matrix.of(fp8, begin))


def boxes(size: tuple[int, ...], begin: int, end: int) -> Iterator[Box]:
    """The elements begin..end-1 of a row-major array of shape `size` as boxes, in order: at most 2 n - 1 of n
    dimensions."""
    if begin >= end:
        return
    if not size:
        yield (), ()
        return
    row = math.prod(size[1:])
    first, last = begin // row, (end - 1) // row
    if len(size) == 1 or (begin % row == 0 and end % row == 0):
        rows = -(-end // row) - first
        yield (first, *([0] * (len(size) - 1))), (rows, *size[1:])
        return
    if first == last:
        for offset, lengths in boxes(size[1:], begin - first * row, end - first * row):
            yield (first, *offset), (1, *lengths)
        return
    middle_begin, middle_end = -(-begin // row), end // row
    if begin % row:
        yield from boxes(size, begin, middle_begin * row)
    if middle_begin < middle_end:
        yield from boxes(size, middle_begin * row, middle_end * row)
    if end % row:
        yield from boxes(size, middle_end * row, end)


@dataclass(frozen=True)
class StateEntry:
    """Elements begin..end-1 of the flattened part of a parameter, or of one of its moments, in live 1-D storage.

    `key` is "weight.NAME" (the float32 master where there is one), "exp_avg.NAME" or "exp_avg_sq.NAME". Every element
    of the model is `saved` by exactly one rank.
    """

    key: str
    part: ParameterPart
    begin: int
    end: int
    tensor: Tensor
    saved: bool


def chunk_of(numel: int, size: int, index: int) -> tuple[int, int]:
    """The elements that rank `index` of `size` owns: equal lengths, the last ones shorter or empty."""
    length = -(-numel // size)
    return min(index * length, numel), min((index + 1) * length, numel)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """In what gradients of weights in `dtype` are summed."""
    return torch.float64 if dtype == torch.float64 else torch.float32
