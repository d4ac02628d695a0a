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
    table.add_column("means over requests", no_wrap=True)
    for figure in found["figures"]:
        table.add_column(FIGURES[figure], justify="right", no_wrap=True)
    of = list(found["figures"].values())
    table.add_row("requests in both", *(str(each["requests"]) for each in of))
    for i, name in enumerate("AB"):
        table.add_row(f"{name}, ms", *(f"{each['mean'][i] * 1e3:,.3f}" for each in of))
    for name, statistic, scale, form in (("B - A, ms", "difference", 1e3, "+,.3f"), ("B / A", "ratio", 1, ".4f")):
        table.add_row(name, *("-" if each[statistic] is None else _value(each[statistic], scale, form) for each in of))
        table.add_row("  95 %", *(_ends(each[statistic], scale, form) for each in of))
    table.add_row("p (signed rank)", *(f"{each['p']:.2g}" for each in of))
    return table


def _value(of: Values, scale: float, form: str) -> str:
    return f"{of['value'] * scale:{form}}"


def _ends(of: Values | None, scale: float, form: str) -> str:
    if of is None or of["interval"] is None:
        return "-"
    return ", ".join(f"{end * scale:{form}}" for end in of["interval"])
