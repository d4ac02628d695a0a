"""The umbrella command: `moeflow COMMAND ...` is the command of that name."""

from __future__ import annotations

import sys
from importlib import import_module

from . import __version__

COMMANDS = {
    "trace": ("moeflow.traces.cli", "record, check and convert routing traces"),
    "sim": ("moeflow.sim.cli", "replay a trace on modelled hardware"),
    "runtime": ("moeflow.runtime.cli", "run a model whose experts move, measure policies, check this machine"),
    "policies": ("moeflow.policies.policy_command", "list policies, show one, train a predictor"),
}
USAGE = "usage: moeflow [--help] [--version] COMMAND ...\n\n" + "".join(
    f"  {name:<8} {summary}\n" for name, (_, summary) in COMMANDS.items()
)


def main() -> None:
    """Hand the arguments after the command's name to that command, which alone is imported."""
    name, rest = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("", [])
    if name in ("-h", "--help"):
        print(USAGE, end="")
    elif name == "--version":
        print(f"moeflow {__version__}")
    elif name in COMMANDS:
        sys.argv = [f"moeflow {name}", *rest]
        if name == "sim":
            sim()
        else:
            import_module(COMMANDS[name][0]).main()
    else:
        problem = f"no such command: {name}" if name else "a command is missing"
        print(f"error: {problem}\n\n{USAGE}", end="", file=sys.stderr)
        raise SystemExit(2)


def sim() -> None:
    """The `sim` command. What it measures is the runtime's, which the simulator does not know: it is added here."""
    from .runtime.calibrate_command import calibrate_command
    from .sim.cli import main
    from .sim.hw_command import app

    app.command("calibrate")(calibrate_command)
    main()


if __name__ == "__main__":
    main()
