"""What must hold of the dense donors before a weight is written, and which run may be gone on with."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moeforge.checkpoint import Checkpoint
from moeforge.checkpoint.writer import partial_directory
from moeforge.errors import UserError
from moeforge.upcycle.config import UpcycleConfig


def check_donors(donors: Sequence[Checkpoint], config: UpcycleConfig) -> None:
    """UserError unless the donors share one configuration and one tokenizer, and each gets a copy."""
    first = donors[0]
    if len(donors) > config.copies:
        raise UserError(f"upcycle source: {len(donors)} donors; at most {config.copies}, one for each copy of a layer")
    if len(donors) == 1 and first.path.is_file():
        return  # a GGUF file's tokenizer is read, and checked, when it is copied: before any weight
    vocabulary = _vocabulary(first)
    for donor in donors[1:]:
        for field in dataclasses.fields(first.config):
            mine, theirs = getattr(first.config, field.name), getattr(donor.config, field.name)
            if mine != theirs and field.name != "family":
                raise UserError(
                    f"{donor.path}: {field.name} = {theirs}, but {mine} in {first.path}; donors must be alike"
                )
        if _vocabulary(donor) != vocabulary:
            raise UserError(f"{donor.path}: another tokenizer than {first.path}; donors must share one tokenizer")


def job(donors: Sequence[Checkpoint], config: UpcycleConfig) -> str:
    """One line of JSON that names a run: arguments, and each donor's path with its files' sizes and times."""
    sources = [[str(donor.path.resolve()), *_files(donor.path)] for donor in donors]
    return json.dumps({**dataclasses.asdict(config), "source": sources})


def check_remains(out: Path, found: str | None, wanted: str) -> None:
    """UserError if the interrupted run `found` beside `out` is not the run `wanted`."""
    if found is None or found == wanted:
        return
    try:
        begun: dict[str, Any] = json.loads(found)
    except ValueError:
        begun = {}
    for key, value in json.loads(wanted).items():
        if begun.get(key) != value:
            told = "other files" if key == "source" else f"it had {begun.get(key)!r}, now {value!r}"
            raise UserError(
                f"{out}: an interrupted run with another {key} is there ({told}); repeat its arguments to go "
                f"on, or remove {partial_directory(out)} to start anew"
            )


def _vocabulary(donor: Checkpoint) -> dict[str, int] | None:
    if not donor.has_tokenizer:
        return None
    vocabulary: dict[str, int] = donor.tokenizer().get_vocab()
    return vocabulary


def _files(path: Path) -> list[list[Any]]:
    files = [path] if path.is_file() else sorted(file for file in path.iterdir() if file.is_file())
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
