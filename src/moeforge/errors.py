"""Errors that a user can act on. The command line prints them as one line."""

from __future__ import annotations

import errno


class UserError(Exception):
    """Bad input: one line naming the key, the value and what is allowed. Exit code 2."""

    exit_code = 2


class RunError(Exception):
    """A fault while running (a full disk, a lost file): one line, what was saved and where. Exit code 1."""

    exit_code = 1


_NO_ROOM = {
    errno.ENOSPC: "no space left on device",
    errno.EDQUOT: "disk quota exceeded",
    errno.EFBIG: "file too large",
}


def no_room(error: BaseException | None) -> str | None:
    """Which kind of full disk is behind an error, however deep it lies and whichever library raised it."""
    while error is not None:
        words = str(error)
        for code, text in _NO_ROOM.items():
            # safetensors tells the number in words only; torch.save only that it got less far than meant
            torch_short = code == errno.ENOSPC and "inline_container" in words and "unexpected pos" in words
            if getattr(error, "errno", None) == code or f"(os error {code})" in words or torch_short:
                return text
        error = error.__cause__ or error.__context__
    return None
