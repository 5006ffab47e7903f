"""What a corpus is made of: a source, and the files behind its path."""

import glob
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from moeforge.errors import UserError

FORMATS = ("auto", "text", "jsonl", "parquet", "hub")
SUFFIXES = {
    "text": (".txt", ".text", ".md", ".rst"),
    "jsonl": (".jsonl", ".ndjson", ".json"),
    "parquet": (".parquet",),
}
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?(@[\w./-]+)?")


@dataclass(frozen=True)
class Source:
    """One corpus. The keys of a `data.train` entry in the configuration, plus documents held in memory.

    path            file, directory, glob, or `owner/name[:config][@revision]` of a hub dataset; a label when
                    `documents` are given
    weight          how often an epoch sees each sequence of this source: 1.0 once, 2.0 twice, 0.5 in every
                    second epoch. It multiplies the source's natural size and is no share of the mixture
    format          auto (by file name), text (a file is a document), jsonl or parquet (a row is one), hub
    text_field      the field of a row that holds the text
    messages_field  the field that holds a list of {role, content}; set: chat, loss on assistant turns only
    split           of a hub dataset
    documents       texts in memory; any iterable, kept as a tuple
    """

    path: str
    weight: float = 1.0
    format: str = "auto"
    text_field: str = "text"
    messages_field: str | None = None
    split: str = "train"
    documents: Iterable[str] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise UserError(f"data format {self.format!r} of {self.path!r}: allowed are {', '.join(FORMATS)}")
        if not 0 <= self.weight < float("inf"):
            raise UserError(f"data weight {self.weight} of {self.path!r}: a number of 0 or more is needed")
        if self.documents is not None:
            # A one-shot iterator could not be both fingerprinted and read.
            object.__setattr__(self, "documents", tuple(self.documents))

    @classmethod
    def of(cls, other: Any) -> "Source":
        """The source with the attributes of `other` (a pydantic entry of the configuration, or a Source)."""
        if isinstance(other, cls):
            return other
        return cls(**{f.name: getattr(other, f.name) for f in fields(cls) if hasattr(other, f.name)})


@dataclass(frozen=True)
class CorpusFile:
    path: Path
    format: str  # text, jsonl or parquet


def corpus_files(source: Source) -> list[CorpusFile]:
    """The files behind a source's path, sorted; empty for a hub dataset and for documents in memory.

    A directory gives the files whose names say their format, or, with an explicit format, all files in it.
    Raises UserError: nothing there, or a file name that tells no format.
    """
    if source.documents is not None or source.format == "hub":
        return []
    root = Path(source.path).expanduser()
    if root.is_dir():
        found = [p for p in root.rglob("*") if p.is_file() and not _hidden(p.relative_to(root))]
        if source.format == "auto":
            found = [p for p in found if _format_of(p)]
    elif root.exists():
        found = [root]
    else:
        found = [Path(p) for p in glob.glob(str(root), recursive=True) if Path(p).is_file()]
        if not found and source.format == "auto" and is_hub_id(source.path):
            return []
    if not found:
        what = "holds no file of a known format" if root.is_dir() else "no such file or directory"
        raise UserError(f"data path {source.path!r}: {what} (known: {_known_suffixes()}; or set format to hub)")
    return [CorpusFile(path, _require_format(path, source)) for path in sorted(found)]


def is_hub_id(path: str) -> bool:
    """Whether a path that does not exist may be a hub dataset: owner/name without a corpus file's suffix."""
    return bool(_HUB_ID.fullmatch(path)) and _format_of(Path(path)) is None


def _require_format(path: Path, source: Source) -> str:
    name = _format_of(path) if source.format == "auto" else source.format
    if name is None:
        raise UserError(
            f"data path {str(path)!r}: its name tells no format (known: {_known_suffixes()}); "
            f"set format to text, jsonl or parquet"
        )
    return name


def _format_of(path: Path) -> str | None:
    plain = path.with_suffix("") if path.suffix.lower() in COMPRESSIONS else path
    return next((name for name, known in SUFFIXES.items() if plain.suffix.lower() in known), None)


def _hidden(relative: Path) -> bool:
    return any(part.startswith(".") for part in relative.parts)


def _known_suffixes() -> str:
    return ", ".join(suffix for known in SUFFIXES.values() for suffix in known)
