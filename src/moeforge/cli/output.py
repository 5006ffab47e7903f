"""What a verb prints: one JSON object with `--json`, otherwise something good to read. Failures are one line.

Results go to stdout, everything else (progress, notes, warnings) to stderr.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import IO, TYPE_CHECKING, Annotated, Any

import typer

from moeforge.errors import RunError, UserError, no_room

if TYPE_CHECKING:
    from rich.console import Console

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, all else on stderr.")]

_PIPED_WIDTH = 110

_PATH = {
    errno.EACCES: "permission denied; name a file or directory that you may use",
    errno.EPERM: "permission denied; name a file or directory that you may use",
    errno.EROFS: "lies on a read-only file system; name another place",
    errno.ENOTDIR: "one of its parents is a file; name another place",
    errno.EISDIR: "is a directory; a file is needed here",
    errno.EEXIST: "is in the way; remove it or name another place",
    errno.ENAMETOOLONG: "the name is too long",
}
_results: IO[str] | None = None


@contextlib.contextmanager
def reserve_stdout(only_results: bool) -> Iterator[None]:
    """With `only_results`, what libraries print to stdout lands on stderr; only `emit` writes to stdout."""
    global _results
    if not only_results:
        yield
        return
    _results = sys.stdout
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
        _results.flush()
    finally:
        _results = None


def is_first_rank() -> bool:
    """Of the processes that torchrun started, one speaks: what all have found, it prints."""
    return os.environ.get("RANK", "0") == "0"


def speaks_of_failure() -> bool:
    """Whether this process is to print why it fails; of ranks that fail alike, one is."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return True
    from moeforge.parallel import launch

    return launch.speaks_of_failure()


def emit(result: Mapping[str, Any], as_json: bool, human: Callable[[], Any] | str | None = None) -> None:
    """Print a verb's result.

    With `as_json`: `result` as one JSON object (non-finite numbers become null; paths, dataclasses, numpy and
    torch values are understood). Otherwise `human`: a string, or a function that returns a string or anything
    rich prints (a Table, a Group); without it, the keys and values of `result` one below the other.
    """
    if not is_first_rank():
        return
    stream = _results or sys.stdout
    if as_json:
        print(json.dumps(jsonable(result), allow_nan=False), file=stream, flush=True)
        return
    shown = human() if callable(human) else human
    if shown is None:
        width = max(map(len, result), default=0)
        shown = "\n".join(f"{key:<{width}}  {value}" for key, value in result.items())
    if isinstance(shown, str):
        print(shown, file=stream, flush=True)
        return
    from rich.console import Console

    console = Console(file=stream)
    if not console.is_terminal and "COLUMNS" not in os.environ:  # whoever reads it wants whole numbers
        console.width = _PIPED_WIDTH
    console.print(shown)


def stderr_console() -> Console:
    """A rich console on stderr: for progress bars, notes and warnings."""
    from rich.console import Console

    return Console(stderr=True, quiet=not is_first_rank())


def describe_failure(error: Exception) -> tuple[str, int | None]:
    """One line about `error` and its exit code; None as the code where nobody foresaw the error."""
    if isinstance(error, UserError | RunError):
        return _one_line(str(error)), error.exit_code
    if isinstance(error, typer.TyperException):
        context = getattr(error, "ctx", None)
        see = f" (see '{context.command_path} --help')" if context is not None else ""
        return _one_line(error.format_message() + _refused_value(error)) + see, error.exit_code
    if full := no_room(error):
        name = getattr(error, "filename", None)
        where = f" while writing {name}" if name else ""
        return f"{full}{where}: make room and run the command again", RunError.exit_code
    if isinstance(error, OSError) and error.errno in _PATH and error.filename:
        return _one_line(f"{error.filename}: {_PATH[error.errno]}"), UserError.exit_code
    return _one_line(f"{type(error).__name__}: {error}"), None


def _refused_value(error: Exception) -> str:
    """What typer's message about a value of the wrong type leaves out: the value."""
    problems = getattr(error.__cause__, "errors", None)
    return f": {problems()[0]['input']!r}" if callable(problems) else ""


def discard_stdout() -> None:
    """After a broken pipe: send the interpreter's last flush of stdout nowhere."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _one_line(text: str) -> str:
    return " ".join(text.split())


def jsonable(value: Any) -> Any:
    """`value` as `json.dumps` takes it; see `emit`."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return jsonable(dataclasses.asdict(value))
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [jsonable(item) for item in value]
    if hasattr(value, "tolist"):  # numpy and torch, scalars and arrays
        return jsonable(value.tolist())
    return str(value)
