"""The web page at /: plain HTML, CSS and JavaScript, loaded from nowhere else."""

from __future__ import annotations

from importlib.resources import files

_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript"}


def assets() -> dict[str, tuple[bytes, str]]:
    """What is served at which path: content and media type."""
    names = {"/": "index.html", "/page.css": "page.css", "/page.js": "page.js"}
    here = files(__name__)
    return {path: (here.joinpath(name).read_bytes(), _TYPES[name.rpartition(".")[2]]) for path, name in names.items()}
