"""The commented training file of `train --init`, generated from the schema."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from moeforge.config.keys import Key, Table, keys, tables, toml_value

_HEADER = """\
Training file of moeforge: set model.path and the path below [[data.train]]; every other line states its
default and may be deleted. On the command line: moeforge train FILE --set train.steps=500
"""
_PLACEHOLDERS = {
    "model.path": "path/to/model",
    "data.train.path": "path/to/corpus.txt",
    "data.eval.path": "path/to/heldout.txt",
    "data.train.messages_field": "messages",
    "data.eval.messages_field": "messages",
}
_WIDTH = 100


def commented_template() -> str:
    """TOML that `load_config` reads: every key with its meaning, what is allowed and its default.

    Keys without a default hold a placeholder; optional keys and lists are commented out.
    """
    blocks = ["\n".join(_comment(_HEADER)), *("\n".join(_table(table)) for table in tables())]
    return "\n\n".join(blocks) + "\n"


def _table(table: Table) -> Iterator[str]:
    lists = {other.name for other in tables() if other.repeated}
    own = [key for key in table.keys if key.name not in lists]
    if not table.repeated:
        yield from _comment(table.meaning)
        yield f"[{table.name}]"
    elif keys()[table.name].required:
        yield from _comment(keys()[table.name].meaning)
        yield f"[[{table.name}]]"
    else:
        yield from _comment(keys()[table.name].meaning)
        yield f"# [[{table.name}]]"
        yield from (f"# {_assignment(key)}" for key in own)
        return
    for key in own:
        yield from _comment(key.meaning)
        yield from _comment(_limits(key))
        yield _assignment(key) if key.required or key.default is not None else f"# {_assignment(key)}"


def _limits(key: Key) -> str:
    default = "absent by default" if key.default is None else f"default {toml_value(key.default)}"
    text = f"{key.allowed}; {'required' if key.required else default}."
    text = text.removeprefix("a non-empty string; ")
    return text[0].upper() + text[1:]


def _assignment(key: Key) -> str:
    value = _PLACEHOLDERS[key.name] if key.default is None else key.default
    return f"{key.name.rpartition('.')[2]} = {toml_value(value)}"


def _comment(text: str) -> list[str]:
    return [f"# {line}" for line in textwrap.wrap(text, _WIDTH - 2, break_on_hyphens=False)]
