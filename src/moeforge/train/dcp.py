"""Training state in the files of torch.distributed.checkpoint (DCP).

A rank holds flat ranges of its parts of parameters. Cut into boxes of the global tensors they are what DCP stores, so
that any other layout finds its own boxes by intersection. Only DCP's planners and storage are used: they need no
process group, and leave to the caller when ranks speak to each other.
"""

from __future__ import annotations

import math
import pickle
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path, PurePath
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from moeforge.errors import UserError
from moeforge.parallel.parameters import StateEntry, boxes

METADATA = ".metadata"
Written = tuple[SavePlan, list[WriteResult]]
"""What a rank has written, for the metadata that the first rank writes."""


class Boxes:
    """What a rank holds of one global tensor, as DCP's planners ask for it."""

    def __init__(self, view: Iterable[int]) -> None:
        self.view = torch.Size(view)
        self.found: list[tuple[ChunkStorageMetadata, Tensor]] = []

    def add(self, offset: Iterable[int], tensor: Tensor) -> None:
        """`tensor` is the box at `offset`."""
        self.found.append((ChunkStorageMetadata(torch.Size(offset), tensor.shape), tensor))

    def size(self) -> torch.Size:
        """Of the global tensor."""
        return self.view

    def numel(self) -> int:
        """Elements in all boxes."""
        return sum(tensor.numel() for _, tensor in self.found)

    def tensor(self, index: MetadataIndex) -> Tensor:
        """The box at an offset. The index is a hint, as everywhere in DCP."""
        hint = index.index
        if hint is not None and hint < len(self.found) and self.found[hint][0].offsets == index.offset:
            return self.found[hint][1]
        return next(tensor for chunk, tensor in self.found if chunk.offsets == index.offset)

    def __create_write_items__(self, name: str, _: object) -> list[WriteItem]:
        return [
            WriteItem(
                MetadataIndex(name, chunk.offsets),
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, TensorProperties.create_from_tensor(tensor), self.view),
            )
            for chunk, tensor in self.found
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [chunk for chunk, _ in self.found]


def boxes_of(entries: Iterable[StateEntry], storage: Callable[[Tensor], Tensor]) -> dict[str, Boxes]:
    """By key, the boxes that the entries are, in `storage` of each entry's flat tensor (itself, or a copy)."""
    state: dict[str, Boxes] = {}
    for entry in entries:
        if entry.begin >= entry.end:
            continue
        flat, position = storage(entry.tensor.detach()), 0
        held = state.setdefault(entry.key, Boxes(entry.part.view))
        for offset, size in boxes(entry.part.size, entry.begin, entry.end):
            length = math.prod(size)
            start = (a + b for a, b in zip(entry.part.offset, offset, strict=True))
            held.add(start, flat[position : position + length].view(size))
            position += length
    return state


class _SavePlanner(DefaultSavePlanner):
    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        found: Tensor = self.state_dict[index.fqn].tensor(index)
        return found


class _LoadPlanner(DefaultLoadPlanner):
    def __init__(self, state: dict[str, Boxes], metadata: Metadata) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.state_dict, self.metadata = state, metadata

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        found: Tensor = self.state_dict[index.fqn].tensor(index)
        return found


def write(directory: Path, state: dict[str, Boxes], rank: int) -> Written:
    """Write what this rank holds; no other rank is needed. Files are synced."""
    planner, writer = _SavePlanner(), FileSystemWriter(directory, per_thread_copy_ahead=0)
    planner.set_up_planner(state, writer.storage_meta(), rank == 0)
    writer.set_up_storage_writer(rank == 0, rank=rank, use_collectives=False)
    plan = writer.prepare_local_plan(planner.create_local_plan())
    return plan, writer.write_data(plan, planner).wait()


def write_metadata(directory: Path, written: list[Written]) -> None:
    """Write the index of what all ranks wrote. Raises ValueError where it overlaps or leaves something out."""
    _, metadata = _SavePlanner().create_global_plan([plan for plan, _ in written])
    FileSystemWriter(directory).finish(metadata, [results for _, results in written])


class SavedState:
    """The DCP files of a checkpoint. Raises UserError naming a file that is missing or damaged."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._reader = _Reader(directory)
        try:
            self._metadata = self._reader.read_metadata()
            self._reader.set_up_storage_reader(self._metadata, True)
        except Exception as error:  # a damaged pickle may raise anything
            raise _unreadable(directory / METADATA, error) from error

    def stored(self, key: str) -> TensorStorageMetadata:
        """Size and dtype of a global tensor."""
        found = self._metadata.state_dict_metadata.get(key)
        if not isinstance(found, TensorStorageMetadata):
            raise UserError(f"{self.directory / METADATA}: {key} is missing; use another checkpoint")
        return found

    def read(self, state: dict[str, Boxes]) -> None:
        """Fill the boxes in place."""
        for key, held in state.items():
            if self.stored(key).size != held.size():
                raise UserError(
                    f"{self.directory}: {key} has shape {tuple(self.stored(key).size)}, this model needs "
                    f"{tuple(held.size())}; use a checkpoint of this model"
                )
        planner = _LoadPlanner(state, self._metadata)
        plan = planner.create_local_plan()
        found: Counter[str] = Counter()
        for item in plan.items:
            found[item.dest_index.fqn] += math.prod(item.lengths)
        for key, held in state.items():
            if found[key] != held.numel():
                raise UserError(f"{self.directory / METADATA}: lacks a part of {key}; use another checkpoint")
        by_file: dict[str, list[ReadItem]] = defaultdict(list)
        for item in plan.items:
            by_file[self._reader.storage_data[item.storage_index].relative_path].append(item)
        for file, items in sorted(by_file.items()):
            try:
                self._reader.read_data(LoadPlan(items), planner).wait()
            except Exception as error:
                raise _unreadable(self.directory / file, error) from error

    def tensor(self, key: str) -> Tensor:
        """A whole global tensor, on the CPU."""
        stored = self.stored(key)
        found, held = torch.empty(stored.size, dtype=stored.properties.dtype), Boxes(stored.size)
        held.add([0] * found.ndim, found)
        self.read({key: held})
        return found


class _Reader(FileSystemReader):
    """Takes from the pickled metadata only what DCP puts there, so that no checkpoint can run code."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / METADATA).open("rb") as file:
            metadata = _Unpickler(file).load()
        if not isinstance(metadata, Metadata):
            raise ValueError("holds something else")
        return metadata


_MODULES = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
_OTHERS = ("torch", "torch.serialization", "pathlib", "pathlib._local")


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module in _MODULES + _OTHERS:
            found = super().find_class(module, name)
            if isinstance(found, type):
                allowed = module in _MODULES or issubclass(found, PurePath | torch.Size)
            else:
                allowed = isinstance(found, torch.dtype) or name == "_get_layout"
            if allowed:
                return found
        raise pickle.UnpicklingError(f"refers to {module}.{name}, which no checkpoint needs")


def _unreadable(path: Path, error: Exception) -> UserError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    what = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({reason})"
    return UserError(f"{path}: {what}; the checkpoint is incomplete or damaged: use another one")


def missing_files(directory: Path, written: Iterable[Written]) -> list[str]:
    """Files that some rank wrote but that are not to be seen here."""
    names = {result.storage_data.relative_path for _, results in written for result in results}
    return sorted(name for name in names if not (directory / name).is_file())
