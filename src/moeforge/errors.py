"""Errors that a user can act on. The command line prints them as one line."""


class UserError(Exception):
    """Bad input: one line naming the key, the value and what is allowed. Exit code 2."""

    exit_code = 2


class RunError(Exception):
    """A fault while running (a full disk, a lost file): one line, what was saved and where. Exit code 1."""

    exit_code = 1
