"""Text that every machine with Python has: its documentation topics and its standard library."""

import hashlib
import sysconfig
import tokenize
from pathlib import Path

from moeforge.data.source import Source

_LEFT_OUT = {"test", "tests", "encodings", "idlelib", "pydoc_data", "site-packages", "dist-packages"}
_FILE_BYTES = 200_000


def python_corpus(max_bytes: int | None = None) -> tuple[list[str], list[str]]:
    """(documents, labels) of the running Python, topics first, each sorted by name; the same on every call.

    `max_bytes` limits the sources (topics always come whole): files are then taken in the order of a hash of
    their names, so that a small corpus is as mixed as the whole. Files over
    200 kB, tables mostly, are left out.
    """
    documents, labels = [], []
    for name, text in sorted(_topics().items()):
        documents.append(text.strip() + "\n")
        labels.append(f"topic {name}")
    for name, text in sorted(_sources(max_bytes).items()):
        documents.append(text)
        labels.append(f"module {name}")
    return documents, labels


def python_source(max_bytes: int | None = None) -> Source:
    """The corpus above as a source for `build_cache`."""
    return Source(path="python", documents=python_corpus(max_bytes)[0])


def _topics() -> dict[str, str]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions leave it out of their minimal Python
        return {}
    return dict(topics)


def _sources(max_bytes: int | None) -> dict[str, str]:
    root = Path(sysconfig.get_path("stdlib"))
    names = [path.relative_to(root) for path in root.rglob("*.py")]
    names = [name for name in names if not _LEFT_OUT.intersection(name.parts[:-1])]
    names.sort(key=lambda name: hashlib.sha256(name.as_posix().encode()).digest())
    chosen: dict[str, str] = {}
    total = 0
    for name in names:
        size = (root / name).stat().st_size
        if not 0 < size <= _FILE_BYTES:
            continue
        if max_bytes is not None and total + size > max_bytes:
            break
        try:
            with tokenize.open(root / name) as file:
                chosen[name.as_posix()] = file.read()
        except (SyntaxError, UnicodeDecodeError, OSError):
            continue
        total += size
    return chosen
