"""`moeflow runtime`: run models whose experts move, measure policies on this machine, and say what it can do."""

from __future__ import annotations

import typer

from ..errors import run_command
from .bench_command import bench
from .doctor_command import doctor
from .generate_command import generate

app = typer.Typer(
    help="Run Mixture-of-Experts models whose experts move, under the policy that the simulator replays.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command()(generate)
app.command()(bench)
app.command()(doctor)


def main() -> None:
    """Entry point of `moeflow runtime`."""
    run_command(app)
