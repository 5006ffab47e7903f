"""Files that are whole or not there."""

from __future__ import annotations

import os
from pathlib import Path

from moeforge.errors import RunError, UserError, no_room


def write_whole(path: Path, text: str) -> None:
    """Write a text file under a temporary name, then rename it; missing parents are made.

    What was there before stays until then. Raises RunError where the disk is full, UserError where nothing
    can be written.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            draft.write_text(text, encoding="utf-8")
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)
    except OSError as error:
        if full := no_room(error):
            raise RunError(f"{path}: cannot be written ({full}); make room and run the command again") from error
        raise UserError(f"{path}: cannot be written ({error.strerror})") from error
