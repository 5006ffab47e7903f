"""The keys of the training file as a list, for the error messages, the template and the reference page."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import tomli_w

from moeforge.config.schema import TrainConfig


@dataclass(frozen=True)
class Key:
    """One key. `name` is dotted, without list indices: "data.train.path" stands for "data.train.0.path"."""

    name: str
    allowed: str
    meaning: str
    required: bool
    default: Any
    is_text: bool

    @property
    def section(self) -> str:
        """Everything before the last dot."""
        return self.name.rpartition(".")[0]


@dataclass(frozen=True)
class Table:
    """A section; `repeated` ones are lists of tables, written [[name]]."""

    name: str
    meaning: str
    repeated: bool
    keys: tuple[Key, ...]


@cache
def tables() -> tuple[Table, ...]:
    """All sections with their keys, in the order of the schema; a list of tables follows its parent."""
    schema = TrainConfig.model_json_schema()
    found: list[Table] = []
    for name, entry in schema["properties"].items():
        found.extend(_tables(name, entry, schema["$defs"], repeated=False))
    return tuple(found)


@cache
def keys() -> dict[str, Key]:
    """Every key by its dotted name."""
    return {key.name: key for table in tables() for key in table.keys}


def _tables(name: str, entry: dict[str, Any], defs: dict[str, Any], repeated: bool) -> Iterator[Table]:
    body = defs[_reference(entry)]
    own: list[Key] = []
    inner: list[Table] = []
    for leaf, field in body["properties"].items():
        dotted = f"{name}.{leaf}"
        own.append(
            Key(
                name=dotted,
                allowed=_allowed(field, dotted),
                meaning=field["description"],
                required=leaf in body.get("required", ()),
                default=field.get("default"),
                is_text=field.get("type") == "string" and "enum" not in field,
            )
        )
        if "$ref" in field.get("items", {}):
            inner.extend(_tables(dotted, field["items"], defs, repeated=True))
    yield Table(name, body["description"], repeated, tuple(own))
    yield from inner


def _reference(entry: dict[str, Any]) -> str:
    """The name of the definition that `entry` refers to (directly, or wrapped beside a default)."""
    pointer: str = entry["$ref"] if "$ref" in entry else entry["allOf"][0]["$ref"]
    return pointer.rpartition("/")[2]


def _allowed(field: dict[str, Any], name: str) -> str:
    """The allowed values in words, to follow "must be"."""
    if "anyOf" in field:
        return ", or ".join(_allowed(part, name) for part in field["anyOf"] if part.get("type") != "null")
    if "enum" in field:
        return "one of " + ", ".join(field["enum"])
    if "prefixItems" in field:
        return f"a list of {len(field['prefixItems'])}, each {_allowed(field['prefixItems'][0], name)}"
    match field["type"]:
        case "boolean":
            return "true or false"
        case "string":
            return "a string" if field.get("minLength", 0) == 0 else "a non-empty string"
        case "array":
            if "$ref" not in field["items"]:
                each = _allowed(field["items"], name)
                return "a list of strings" if each.endswith("string") else f"a list, each {each}"
            return f"a {'non-empty ' if field.get('minItems') else ''}list of tables ([[{name}]])"
        case kind:
            return f"{'an integer' if kind == 'integer' else 'a number'}{_bounds(field)}"


def _bounds(field: dict[str, Any]) -> str:
    low = {"minimum": " at least {}", "exclusiveMinimum": " greater than {}"}
    high = {"maximum": "at most {}", "exclusiveMaximum": "less than {}"}
    parts = [text.format(field[bound]) for bound, text in {**low, **high}.items() if bound in field]
    return " and ".join(parts)


def toml_value(value: Any) -> str:
    """A default as it is written in TOML, on one line."""
    if isinstance(value, list):
        return f"[{', '.join(map(toml_value, value))}]"
    return tomli_w.dumps({"value": value}).partition("=")[2].strip()
