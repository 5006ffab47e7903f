"""Finds the verb, imports its module only then, and turns every failure into one line and an exit code.

How to add a verb: put one row into VERBS and write `moeforge/cli/<verb>.py` with either

- `command`: a function with typer annotations, for a verb that does one thing (`moeforge inspect MODEL`); or
- `commands`: a mapping name -> such function, for a verb with sub-verbs (`moeforge plan train ...`).

The function's docstring is its help. It takes `json: Json = False` (`moeforge.cli.output.Json`), ends with
`emit(result, json, human)` and returns nothing. At its top its module imports only typer, the standard
library and the light rooms (errors, layout, config without pydantic); torch and all heavy rooms are imported
inside the function, so that `--help` stays instant. Bad input raises `UserError`, a fault while running
`RunError`.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from moeforge.cli import output

VERBS = {
    "quickstart": "The whole way on a real model: upcycle, train, evaluate, generate, report, serve.",
    "upcycle": "Turn a dense checkpoint into a mixture of experts.",
    "train": "Train a model from a TOML file.",
    "quantize": "Make an FP8 checkpoint of a model, and say what it costs in quality.",
    "export": "Make a model directory of a training checkpoint.",
    "eval": "Held-out loss and perplexity of a model.",
    "generate": "Continue a prompt with a model.",
    "serve": "An OpenAI-compatible server for a model, and a page to chat with it.",
    "inspect": "What a model is made of: sizes, layers, parameters total and active.",
    "plan": "Place a model on the GPUs you have.",
    "claims": "The reference system's headline claims, derived again; published runs, predicted.",
    "bench": "Measure speed and memory, ours and the peers'.",
    "report": "One self-contained HTML page about one or more runs.",
    "doctor": "What this machine can do, and which optional packages are missing.",
}
SETTINGS: dict[str, Any] = {
    "add_completion": False,
    "rich_markup_mode": None,
    "pretty_exceptions_enable": False,
    "context_settings": {"help_option_names": ["-h", "--help"], "max_content_width": 110},
}


class LazyGroup(TyperGroup):
    """Lists the verbs from VERBS; imports a verb's module when the verb is called, never to list it."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        for verb, text in VERBS.items():
            self.add_command(TyperCommand(verb, help=text, short_help=text))

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        name, command, rest = super().resolve_command(ctx, args)
        return name, command if name is None else load_verb(name), rest


def load_verb(verb: str) -> Any:
    """The typer command, or group of commands, that `moeforge.cli.<verb>` defines."""
    module = importlib.import_module(f"moeforge.cli.{verb}")
    app = typer.Typer(help=VERBS[verb], **SETTINGS)
    if hasattr(module, "command"):
        app.command(verb)(module.command)
    else:
        app.callback()(lambda: None)
        for name, function in module.commands.items():
            app.command(name)(function)
    return typer.main.get_command(app)


root = typer.Typer(cls=LazyGroup, **SETTINGS)


@root.callback(
    invoke_without_command=True,
    epilog="Exit codes: 0 done, 1 a fault while running, 2 bad input, 130 interrupted. Where SIGTERM or Ctrl-C stops "
    "moeforge train, it saves the run first and exits with 0; in its --json, interrupted then names the signal. "
    "moeforge serve answers what runs first, and exits with 0.",
)
def _root(
    ctx: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Turn a dense model into a sparse mixture of experts, train it without collapse, and serve it."""
    if version:
        from moeforge import __version__

        typer.echo(f"moeforge {__version__}")
        raise typer.Exit
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())
        raise typer.Exit


def main(argv: list[str] | None = None) -> int:
    """Run one command line. Exit code: 0 done, 1 a fault while running, 2 bad input, 130 interrupted."""
    arguments = sys.argv[1:] if argv is None else argv
    try:
        with output.reserve_stdout("--json" in arguments):
            code = typer.main.get_command(root).main(arguments, prog_name="moeforge", standalone_mode=False)
            sys.stdout.flush()
    except BrokenPipeError:
        output.discard_stdout()
        return 1
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except Exception as error:
        line, code = output.describe_failure(error)
        if code is None:
            if os.environ.get("MOEFORGE_DEBUG") == "1":
                raise
            line, code = f"{line} (unexpected; MOEFORGE_DEBUG=1 shows the traceback)", 1
        elif not output.speaks_of_failure():
            return code
        if not output.is_first_rank():
            line = f"rank {os.environ['RANK']}: {line}"
        print(f"moeforge: error: {line}", file=sys.stderr)
        return code
    return code if isinstance(code, int) else 0
