"""Reading and writing the training file; every mistake in it becomes one line that says what to change."""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import tomli_w
from pydantic import ValidationError

from moeforge.config.keys import Key, keys, tables
from moeforge.config.schema import TrainConfig
from moeforge.config.section import with_tuples
from moeforge.errors import UserError

Location = tuple[str | int, ...]


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Reads a training file and applies dotted overrides ("optimizer.lr=3e-4", "data.train.0.weight=2").

    An override's value is TOML, or else a plain string; the index after the last of a list appends to it.
    Relative paths stay as they are given. Raises UserError, one line, for an unreadable file, a syntax error,
    an unknown key (with the nearest known one), and a value that is not allowed (saying what is).
    """
    return config_of(_read(Path(path)), overrides)


def config_of(data: dict[str, Any], overrides: Sequence[str] = ()) -> TrainConfig:
    """The same of what a training file would hold, as TOML gives it; `data` takes up the overrides."""
    for override in overrides:
        _override(data, override)
    for table in tables():
        if not table.repeated:
            data.setdefault(table.name, {})
    try:
        return TrainConfig.model_validate(with_tuples(data))
    except ValidationError as error:
        problems = error.errors(include_url=False)
        problem = next((each for each in problems if each["type"] == "extra_forbidden"), problems[0])
        raise UserError(_explain(problem["type"], problem["loc"], problem["msg"], data)) from error


def dump_config(config: TrainConfig) -> str:
    """TOML text of every key, defaults included, that `load_config` reads back to an equal configuration."""
    return tomli_w.dumps(config.model_dump(exclude_none=True))


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_bytes().decode("utf-8-sig"))
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; `moeforge train --init` writes a commented one") from error
    except OSError as error:
        raise UserError(f"{path}: cannot read the configuration ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8, which TOML must be") from error
    except tomllib.TOMLDecodeError as error:
        what, _, where = str(error).rstrip(")").rpartition(" (at ")
        raise UserError(f"{path}, {where}: not valid TOML ({what[:1].lower()}{what[1:]})") from error


def _override(data: dict[str, Any], override: str) -> None:
    """Applies one "key=value" in place."""
    dotted, equals, text = override.partition("=")
    dotted, text = dotted.strip(), text.strip()
    if not equals or not dotted:
        raise UserError(f"--set {override}: must be key=value, as in optimizer.lr=3e-4")
    here: Any = data
    *parents, last = parts = dotted.split(".")
    for depth, part in enumerate(parts):
        if isinstance(here, list):
            index = _index(here, parts, depth)
            if index == len(here):
                here.append({})
            if depth == len(parents):
                here[index] = _value(dotted, text)
            here = here[index]
        elif not isinstance(here, dict):
            raise UserError(f"{dotted}: {'.'.join(parts[:depth])} is a value, not a table")
        elif depth == len(parents):
            here[last] = _value(dotted, text)
        else:
            repeated = _generic(parts[: depth + 1]) in {table.name for table in tables() if table.repeated}
            here = here.setdefault(part, [] if repeated else {})


def _index(items: list[Any], parts: list[str], depth: int) -> int:
    """The list position that an override's part `depth` means; one past the end appends."""
    name, part = ".".join(parts[:depth]), parts[depth]
    if part.isdecimal() and int(part) <= len(items):
        return int(part)
    raise UserError(f"{'.'.join(parts)}: {name} is a list; {part} must be an index from 0 to {len(items)}")


def _value(dotted: str, text: str) -> Any:
    """TOML if it is TOML; the bare text otherwise, and for keys that are text anyway (model.path=7)."""
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    key = keys().get(_generic(dotted.split(".")))
    value = parsed["value"]
    bare = len(parsed) > 1 or (key is not None and key.is_text and not isinstance(value, str))
    return text if bare else value


def _explain(kind: str, location: Location, message: str, data: dict[str, Any]) -> str:
    """One line for one of pydantic's errors."""
    if kind == "extra_forbidden":
        _unknown(".".join(map(str, location)))
    prefix = "".join(f"{part}." for part in location)
    if kind == "check":
        return prefix + message
    location, key = _known(location)
    dotted = ".".join(map(str, location))
    allowed = key.allowed if key else "a table"
    try:
        value = data
        for part in location:
            value = value[part]  # type: ignore[index]
    except KeyError:
        return f"{dotted}: missing; must be {allowed}"
    if kind == "finite_number":
        allowed = "a finite number"
    elif kind.startswith(("greater_than", "less_than")) and allowed.startswith(("a number ", "an integer ")):
        allowed = allowed.split(" ", 2)[2]
    return f"{dotted} = {_show(value)}: must be {allowed}"


def _known(location: Location) -> tuple[Location, Key | None]:
    """The longest beginning of `location` that is a key (pydantic adds union members and tuple positions)."""
    for end in range(len(location), 0, -1):
        if key := keys().get(_generic(location[:end])):
            while isinstance(location[end - 1], int):
                end -= 1
            return location[:end], key
    return location, None


def _generic(parts: Sequence[str | int]) -> str:
    """The dotted name without list indices."""
    return ".".join(str(part) for part in parts if not str(part).isdecimal())


def _unknown(dotted: str) -> NoReturn:
    """Raises with the nearest key: the same name elsewhere, a similar one here, a similar one anywhere."""
    generic = _generic(dotted.split("."))
    section, _, leaf = generic.rpartition(".")
    names = list(keys())
    sections = [table.name for table in tables()]
    leaves = {name: name.rpartition(".")[2] for name in names}
    same = [name for name in names if leaves[name] == leaf]
    here = {leaves[name]: name for name in names if keys()[name].section == section}
    close_section = difflib.get_close_matches(generic, sections, 1)
    close_here = difflib.get_close_matches(leaf, here, 1, cutoff=0.5)
    if not section and close_section:
        raise UserError(f"{dotted}: unknown section; did you mean {close_section[0]}?")
    if same:
        nearest = " or ".join(same)
    elif close_here:
        nearest = here[close_here[0]]
    elif close := difflib.get_close_matches(leaf, leaves.values(), 1):
        nearest = " or ".join(name for name in names if leaves[name] == close[0])
    elif here:
        raise UserError(f"{dotted}: unknown key; [{section}] has {', '.join(here)}")
    else:
        raise UserError(f"{dotted}: unknown key; the sections are {', '.join(sections)}")
    index = re.match(r"(data\.(?:train|eval))\.(\d+)\.", dotted)
    if index and nearest.startswith(f"{index[1]}."):
        nearest = nearest.replace(index[1], f"{index[1]}.{index[2]}", 1)
    raise UserError(f"{dotted}: unknown key; did you mean {nearest}?")


def _show(value: Any) -> str:
    """A value as it stands in the file, shortened."""
    if isinstance(value, dict):
        return "a table"
    text = json.dumps(value, ensure_ascii=False, default=str)
    text = text.replace("Infinity", "inf").replace("NaN", "nan")
    return text if len(text) <= 80 else text[:77] + "..."
