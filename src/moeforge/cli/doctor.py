"""`moeforge doctor`: what this machine can do."""
from moeforge.cli.output import Json, emit


def command(json: Json = False) -> None:
    """Show."""
    emit({"a": 1}, json)
