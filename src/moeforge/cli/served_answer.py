"""One chat request to a server of its own: how `moeforge quickstart` ends."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moeforge.errors import RunError

_ANSWER_SECONDS = 300


@contextmanager
def served(model: Path, *options: str) -> Iterator[str]:
    """The URL of `moeforge serve model` on a free port of this machine, for as long as the block runs.

    Raises RunError where the server does not come up.
    """
    command = [sys.executable, "-m", "moeforge", "serve", str(model), "--port", "0", "--json", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            ready = process.stdout.readline()
            if not ready:
                raise RunError(f"moeforge serve {model}: ended with exit code {process.wait()} before it was ready")
            yield json.loads(ready)["url"]
        finally:
            process.terminate()


def ask(url: str, content: str, max_tokens: int) -> dict[str, Any]:
    """The server's reply to one message: what POST /v1/chat/completions answers, greedily."""
    with urllib.request.urlopen(f"{url}/v1/models", timeout=_ANSWER_SECONDS) as reply:
        model = json.load(reply)["data"][0]["id"]
    body = {
        "model": model,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": max_tokens,
        "temperature": 0,
    }
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=_ANSWER_SECONDS) as reply:
        answer: dict[str, Any] = json.load(reply)
    return answer
