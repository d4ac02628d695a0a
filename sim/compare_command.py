"""`sim compare A B`: is the second run faster than the first, beyond what the choice of requests explains?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from .compare import Values


def compare(
    first: Annotated[Path, typer.Argument(metavar="A", help="A folder that `sim run` wrote, or its result.json.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="Another run of the same trace.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of the table.")] = False,
) -> None:
    """Compare two runs of one trace request by request, with 95 % intervals."""
    from .compare import compare as compared
    from .compare import load_result

    found = compared(load_result(first), load_result(second), (str(first), str(second)))
    if as_json:
        print(json.dumps(found, indent=2))
        return
    print_comparison(found)


def print_comparison(found: Values) -> None:
    """What `compare` returned, as a table."""
    from rich.console import Console

    console = Console(soft_wrap=False)
    for name, (path, run) in zip("AB", found["runs"].items(), strict=True):
        labels = [run["exactness"]] + ["oracle"] * run["oracle"] + ["uncalibrated"] * (not run["calibrated"])
        print(
            f"{name}: {path}: {run['policy']} on {run['hardware']} over {run['link']}, "
            f"{run['budget_bytes'] / 2**30:.2f} GiB, {', '.join(labels)}"
        )
    console.print(_table(found))
    if not found["figures"]:
        print("no request has figures in both runs")


def _table(found: Values) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from .compare import FIGURES

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("mean over requests", no_wrap=True)
    for heading in ("n", "A ms", "B ms", "B - A ms [95 %]", "B / A [95 %]", "p"):
        table.add_column(heading, justify="right", no_wrap=True)
    for figure, of in found["figures"].items():
        table.add_row(
            FIGURES[figure], str(of["requests"]), *(f"{mean * 1e3:,.2f}" for mean in of["mean"]),
            _shown(of["difference"], 1e3, "+,.2f"), _shown(of["ratio"], 1, ".3f"), f"{of['p']:.2g}",
        )  # fmt: skip
    return table


def _shown(of: Values | None, scale: float, form: str) -> str:
    if of is None:
        return "-"
    ends = "" if of["interval"] is None else " [" + ", ".join(f"{end * scale:{form}}" for end in of["interval"]) + "]"
    return f"{of['value'] * scale:{form}}{ends}"
