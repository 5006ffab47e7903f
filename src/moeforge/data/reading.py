"""Documents out of a source, one after another; never the whole corpus in memory.

Text and JSON Lines are read directly, so that an error can name the byte or the line, and so that rows need
not agree on a schema (chat messages with optional fields do not). Parquet and the hub go through `datasets`.
"""

import codecs
import difflib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec  # type: ignore[import-untyped]

from moeforge.data.source import Source, corpus_files
from moeforge.errors import UserError

PIECE_CHARACTERS = 1 << 17
_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Piece:
    """A document, or a part of a long text: `last` closes the document. Messages where the source is chat."""

    content: str | list[dict[str, Any]]
    where: str
    last: bool = True


def read_pieces(source: Source) -> Iterator[Piece]:
    """All documents of a source in a fixed order. Raises UserError naming the file and the line or byte."""
    if source.documents is not None:
        for number, text in enumerate(source.documents):
            yield Piece(text, f"{source.path} document {number}")
        return
    files = corpus_files(source)
    if not files:
        yield from _dataset_pieces(_open_hub(source), source, f"hub dataset {source.path}")
    for file in files:
        try:
            if file.format == "text":
                yield from _text_pieces(file.path, source)
            elif file.format == "jsonl":
                yield from _jsonl_pieces(file.path, source)
            else:
                yield from _parquet_pieces(file.path, source)
        except OSError as error:
            raise UserError(f"data path {str(file.path)!r}: cannot be read ({_line(error)})") from error


def _text_pieces(path: Path, source: Source) -> Iterator[Piece]:
    """One file is one document, in pieces small enough to be tokenised side by side."""
    if source.messages_field is not None:
        raise UserError(
            f"data path {str(path)!r}: messages_field {source.messages_field!r} needs jsonl, parquet "
            f"or hub, this is text"
        )
    decoder = codecs.getincrementaldecoder("utf-8")()
    consumed, buffer, where = 0, "", str(path)
    with fsspec.open(str(path), "rb", compression="infer") as stream:
        while True:
            block = stream.read(_BLOCK_BYTES)
            begin = consumed - len(decoder.getstate()[0])
            try:
                buffer += decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                raise _encoding_error(path, begin + error.start) from error
            if begin == 0:
                buffer = buffer.removeprefix("\ufeff")
            consumed += len(block)
            while len(buffer) > PIECE_CHARACTERS:
                cut = _cut(buffer[: PIECE_CHARACTERS + 1])
                yield Piece(buffer[:cut], where, last=False)
                buffer = buffer[cut:]
            if not block:
                yield Piece(buffer, where)
                return


def _cut(text: str) -> int:
    """Where to cut a long text so that the usual pre-tokenisers give what they would have given uncut."""
    at = text.rfind("\n", 1, -1)
    while at > 0:
        if not text[at + 1].isspace():
            return at + 1
        at = text.rfind("\n", 1, at)
    space = text.rfind(" ", 1, -1)
    return space if space > 0 else len(text) - 1


def _jsonl_pieces(path: Path, source: Source) -> Iterator[Piece]:
    offset = 0
    with fsspec.open(str(path), "rb", compression="infer") as stream:
        for number, raw in enumerate(stream, 1):
            where = f"{path} line {number}"
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            except UnicodeDecodeError as error:
                raise _encoding_error(path, offset + error.start) from error
            offset += len(raw)
            if not line:
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{where}: not JSON ({error.msg} at column {error.colno})") from error
            if not isinstance(row, dict):
                raise UserError(f"{where}: holds a {type(row).__name__}, expected one JSON object a line")
            yield from _row_piece(row, source, where)


def _parquet_pieces(path: Path, source: Source) -> Iterator[Piece]:
    import datasets
    import pyarrow
    import pyarrow.parquet

    try:
        pyarrow.parquet.read_schema(path)  # datasets would log a line of its own before it raises
        rows = datasets.load_dataset("parquet", data_files=[str(path)], split="train", streaming=True)
        yield from _dataset_pieces(rows, source, str(path))
    except (pyarrow.ArrowException, datasets.exceptions.DatasetGenerationError) as error:
        raise UserError(f"data path {str(path)!r}: not a Parquet file ({_line(error)})") from error


def _open_hub(source: Source) -> Any:
    import datasets
    from huggingface_hub import HfApi, constants

    name, _, revision = source.path.partition("@")
    name, _, config = name.partition(":")
    try:
        if not constants.HF_HUB_OFFLINE:  # ask once: datasets would retry for half a minute, aloud
            HfApi().dataset_info(name, revision=revision or None, timeout=10)
        return datasets.load_dataset(
            name, config or None, split=source.split, revision=revision or None, streaming=True
        )
    except Exception as error:  # the hub, its cache and the network each have their own kinds
        raise UserError(
            f"data path {source.path!r}: no such file here, and the hub dataset cannot be had "
            f"(split {source.split!r}: {_line(error)})"
        ) from error


def _dataset_pieces(dataset: Any, source: Source, label: str) -> Iterator[Piece]:
    wanted = source.messages_field or source.text_field
    if dataset.column_names is not None:
        _require_field(wanted, dataset.column_names, label)
        dataset = dataset.select_columns([wanted])
    for number, row in enumerate(dataset):
        yield from _row_piece(row, source, f"{label} row {number}")


def _row_piece(row: dict[str, Any], source: Source, where: str) -> Iterator[Piece]:
    """The document in a row; none where the field is null."""
    wanted = source.messages_field or source.text_field
    _require_field(wanted, list(row), where)
    value = row[wanted]
    if value is None:
        return
    if source.messages_field is None:
        if not isinstance(value, str):
            raise UserError(f"{where}: text_field {wanted!r} holds a {type(value).__name__}, not a string")
    elif not (isinstance(value, list) and all(isinstance(m, dict) and "role" in m for m in value)):
        raise UserError(f"{where}: messages_field {wanted!r} must hold a list of {{role, content}}")
    yield Piece(value, where)


def _require_field(wanted: str, present: list[str], where: str) -> None:
    if wanted in present:
        return
    near = difflib.get_close_matches(wanted, present, 1, 0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    there = ", ".join(sorted(present)) or "none"
    raise UserError(f"{where}: no field {wanted!r}; fields there: {there}{hint}")


def _encoding_error(path: Path, offset: int) -> UserError:
    return UserError(f"data path {str(path)!r}: not UTF-8 at byte {offset}; convert the file to UTF-8")


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
