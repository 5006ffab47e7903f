"""ZeRO-1 (Rajbhandari et al., 2020): every rank sums gradients for, keeps the state of, and updates its own elements.

The ranks with the same part of a parameter each own an equal, contiguous chunk of it, parameter by parameter. Which
elements are updated together therefore depends on the parameter alone. With gradient sums and a norm that have the same
bits on every rank, that keeps the copies of a tied embedding equal to the last bit, though they live on two stages with
different other parameters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from moeforge.parallel.group import Group
from moeforge.parallel.mesh import Mesh
from moeforge.parallel.parameters import ParameterPart, chunk_of, wide_dtype

# Elements of one collective: long enough to be efficient, short enough to be a small part of memory.
_BUCKET = 32 * 2**20


class Zero:
    """Who owns what, and the collectives between full local tensors and owned chunks.

    `enabled` false: every rank owns, and updates, all of its parts (plain data parallelism).
    """

    def __init__(self, parts: Mapping[str, ParameterPart], mesh: Mesh, enabled: bool) -> None:
        self.parts, self.mesh, self.enabled = parts, mesh, enabled

    def group(self, name: str) -> Group:
        """The ranks with the same part of this parameter."""
        group: Group = getattr(self.mesh, self.parts[name].reduce)
        return group

    def owned(self, name: str) -> tuple[int, int]:
        """The elements that this rank updates."""
        group, numel = self.group(name), self.parts[name].numel
        return chunk_of(numel, group.size, group.index) if self.enabled else (0, numel)

    def counts(self, name: str) -> bool:
        """Whether what this rank owns of it is counted, and saved, here and nowhere else."""
        first_copy = not self.parts[name].tied or self.mesh.tied.index == 0
        return first_copy and (self.enabled or self.group(name).index == 0)

    def reduce(self, gradients: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        """Owned elements, 1-D, of the gradients' sums over all ranks with the same part, summed in `dtype`.

        `gradients` are full local tensors. Where there is only one rank, they themselves are returned, flattened.
        """
        reduced: dict[str, Tensor] = {}
        for group, names in self._buckets():
            if group.size == 1:
                reduced |= {name: gradients[name].reshape(-1) for name in names}
            elif self.enabled:
                reduced |= self._own_pieces(
                    group.reduce_scatter(self._pack(gradients, names, group.size, dtype)), names
                )
            else:
                flat = torch.cat([gradients[name].reshape(-1).to(dtype) for name in names])
                pieces = group.all_reduce(flat).split([self.parts[name].numel for name in names])
                reduced |= dict(zip(names, pieces, strict=True))
        for name, part in self.parts.items():
            if part.tied:
                reduced[name] = self.mesh.tied.all_reduce(reduced[name].to(dtype))
        return reduced

    def norm(self, owned: Mapping[str, Tensor]) -> Tensor:
        """Euclidean norm over all elements of the model, each counted once; 0-d, equal on every rank."""
        norms = [
            torch.linalg.vector_norm(g, dtype=wide_dtype(g.dtype)) for name, g in owned.items() if self.counts(name)
        ]
        if self.mesh.world.size == 1:
            return torch.linalg.vector_norm(torch.stack(norms))
        total = torch.zeros((), dtype=torch.float64, device=self.mesh.device)
        for each in norms:
            total += each.double().square()
        return self.mesh.world.all_reduce(total).sqrt()

    def gather(self, owned: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
        """Write owned elements into the full local weights, and those of the other ranks, in the weights' type."""
        for group, names in self._buckets():
            if group.size == 1 or not self.enabled:
                apart = [name for name in names if owned[name].data_ptr() != weights[name].data_ptr()]
                if apart:
                    torch._foreach_copy_([weights[name].view(-1) for name in apart], [owned[name] for name in apart])
                continue
            lengths = self._lengths(names, group.size)
            own = torch.zeros(sum(lengths), dtype=weights[names[0]].dtype, device=self.mesh.device)
            for piece, name in zip(own.split(lengths), names, strict=True):
                piece[: len(owned[name])].copy_(owned[name])
            columns = group.all_gather(own).view(group.size, -1).split(lengths, 1)
            for column, name in zip(columns, names, strict=True):
                weights[name].view(-1).copy_(column.reshape(-1)[: self.parts[name].numel])

    def _buckets(self) -> Iterator[tuple[Group, list[str]]]:
        """Parameters with the same group, in table order, some at a time."""
        for reduce in ("dp", "dp_tp", "expert_dp"):
            names, size = list[str](), 0
            for name, part in self.parts.items():
                if part.reduce == reduce:
                    if names and size + part.numel > _BUCKET:
                        yield getattr(self.mesh, reduce), names
                        names, size = [], 0
                    names.append(name)
                    size += part.numel
            if names:
                yield getattr(self.mesh, reduce), names

    def _lengths(self, names: list[str], size: int) -> list[int]:
        return [-(-self.parts[name].numel // size) for name in names]

    def _pack(self, full: Mapping[str, Tensor], names: list[str], size: int, dtype: torch.dtype) -> Tensor:
        """[size * sum of chunk lengths]: first the 0th chunk of every parameter, then the 1st of every one, ..."""
        lengths = self._lengths(names, size)
        alone = full[names[0]]
        if len(names) == 1 and alone.numel() == size * lengths[0] and alone.dtype == dtype:
            return alone.reshape(-1)  # the largest parameters: no copy
        buffer = torch.zeros(size, sum(lengths), dtype=dtype, device=self.mesh.device)
        for column, length, name in zip(buffer.split(lengths, 1), lengths, names, strict=True):
            if length == 0:
                continue
            flat = full[name].reshape(-1)
            rows = len(flat) // length
            column[:rows].copy_(flat[: rows * length].view(rows, length))
            if rest := len(flat) - rows * length:
                column[rows, :rest].copy_(flat[rows * length :])
        return buffer.view(-1)

    def _own_pieces(self, reduced: Tensor, names: list[str]) -> dict[str, Tensor]:
        pieces, start = {}, 0
        for name, length in zip(names, self._lengths(names, self.group(names[0]).size), strict=True):
            begin, end = self.owned(name)
            pieces[name] = reduced[start : start + end - begin]
            start += length
        return pieces
