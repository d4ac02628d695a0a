"""The one exception a user's mistake raises, and how a command shows it.

A leaf: every folder may import it, it imports nothing of moeflow.
"""

from __future__ import annotations

import sys
from collections.abc import Callable


class InputError(ValueError):
    """What is wrong, where, and what to do, in one sentence meant for a person."""

    exit_status = 2


class UnsupportedHardwareError(InputError):
    """The machine lacks something the command needs."""

    exit_status = 3


def run_command(command: Callable[[], object]) -> None:
    """Run a command-line application; turn an `InputError` into one line on stderr and its exit status."""
    try:
        command()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_status) from None
    except BrokenPipeError:  # `... | head` closed the pipe: not a mistake of anybody's
        sys.stderr.close()
        raise SystemExit(0) from None
