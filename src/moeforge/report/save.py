"""Pictures on disk: a format for every suffix, whole or not there."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from moeforge.errors import RunError, UserError, no_room

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_FORMATS = {".svg": "svg", ".png": "png"}
PIXELS_PER_INCH = 160
"""Of PNG pictures."""


def picture_format(path: Path) -> str:
    """What to draw into `path`: "svg" or "png". Raises UserError for any other suffix or a missing directory, so that
    callers learn it before they draw."""
    if path.suffix.lower() not in _FORMATS:
        raise UserError(f"{path}: a picture's name must end in {' or '.join(_FORMATS)}")
    require_directory(path)
    return _FORMATS[path.suffix.lower()]


def require_directory(path: Path) -> None:
    """Raises UserError where the directory of `path` does not exist."""
    if not path.parent.is_dir():
        raise UserError(f"{path}: the directory {path.parent} does not exist")


def save_figure(figure: Figure, path: Path, form: str) -> None:
    """Write a figure as "svg" or "png" under a temporary name, then rename it; equal figures give equal SVGs.

    What was there before stays until then. Raises RunError where the disk is full, UserError where nothing can be
    written.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    metadata = {"Date": None} if form == "svg" else {}
    try:
        try:
            figure.savefig(draft, format=form, dpi=PIXELS_PER_INCH, metadata=metadata)
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)
    except OSError as error:
        if full := no_room(error):
            raise RunError(f"{path}: cannot be written ({full}); make room and run the command again") from error
        raise UserError(f"{path}: cannot be written ({error.strerror})") from error
