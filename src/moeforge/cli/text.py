"""Reading the text file that an option names."""

from __future__ import annotations

from pathlib import Path

from moeforge.errors import UserError


def read_text(option: str, path: Path) -> str:
    """The file's text. Raises UserError naming the option for one that is missing, empty or not UTF-8."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{option} = {str(path)!r}: is not UTF-8 (byte {error.start}); convert it first") from None
    except OSError as error:
        raise UserError(f"{option} = {str(path)!r}: cannot be read ({error.strerror})") from None
    if not text.strip():
        raise UserError(f"{option} = {str(path)!r}: is empty; it must hold some text")
    return text
