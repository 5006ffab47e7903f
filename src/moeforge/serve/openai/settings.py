"""What the HTTP server is told at its start."""

from __future__ import annotations

import ipaddress
import os
import socket
import stat
from dataclasses import dataclass
from pathlib import Path

from moeforge.errors import UserError

API_KEY_VARIABLE = "MOEFORGE_API_KEY"
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")


@dataclass(frozen=True)
class ServerSettings:
    """Who may use the server, and how much of it.

    model                  the name under which the model is served
    keys                   API keys; each is a tenant of its own; none: no authentication
    allowed_hosts          names that a Host header may bear, without ports; None: any
    max_body_bytes         longest request body
    max_bodies_bytes       all bodies together that are being read
    body_timeout_seconds   time to send a body in
    write_timeout_seconds  time that a client may leave a part of an answer unread
    max_choices            most continuations of one request: prompts times n
    """

    model: str
    keys: tuple[bytes, ...] = ()
    allowed_hosts: tuple[str, ...] | None = LOOPBACK_NAMES
    max_body_bytes: int = 4 << 20
    max_bodies_bytes: int = 256 << 20
    body_timeout_seconds: float = 30.0
    write_timeout_seconds: float = 60.0
    max_choices: int = 128


def read_keys(file: Path | None) -> tuple[bytes, ...]:
    """The API keys of a file (one a line) and of the environment. Raises UserError where one is no key."""
    found: list[tuple[str, str]] = []
    if file is not None:
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "is not UTF-8"
            raise UserError(f"--api-key-file {file}: cannot be read ({reason})") from error
        found += [(f"--api-key-file {file}, line {i}", line) for i, line in enumerate(text.splitlines(), 1)]
    found.append((API_KEY_VARIABLE, os.environ.get(API_KEY_VARIABLE, "")))
    keys: dict[bytes, None] = {}
    for where, line in found:
        key = line.strip()
        if key and not (key.isascii() and key.isprintable() and " " not in key):
            raise UserError(f"{where}: a key must be of printable ASCII characters without spaces")
        if key:
            keys[key.encode()] = None
    if file is not None and not keys:
        raise UserError(f"--api-key-file {file}: holds no key; write one a line")
    return tuple(keys)


def others_may_read(file: Path) -> bool:
    """Whether users other than the owner may read `file`."""
    return bool(file.stat().st_mode & (stat.S_IRGRP | stat.S_IROTH))


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`. Raises UserError for a name that means nothing here."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise UserError(f"--host {host}: is no address of this machine; 127.0.0.1 is the safe choice") from error
    return all(ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback for *_, address in found)
