"""What a sweep found, for people: its fastest cells, and for each machine the front of time against memory."""

from __future__ import annotations

from collections import Counter
from itertools import groupby
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from .pareto import pareto_front
from .sweep import Row

SHOWN = 10  # fastest cells; chosen here


def eligible(rows: list[Row]) -> list[Row]:
    """Cells that somebody could run: no error, no oracle, nothing lossy (whose time means nothing without quality)."""
    return [row for row in rows if not row["error"] and not row["oracle"] and row["exactness"] != "lossy"]


def front(rows: list[Row]) -> list[Row]:
    """Per machine and link, the eligible cells that no other beats in both time per token and memory."""
    kept = []
    for _, group in groupby(sorted(eligible(rows), key=_machine), _machine):
        own = list(group)
        kept += [own[i] for i in pareto_front([(row["budget_bytes"], row["tpot_s"]) for row in own])]
    return kept


def fastest(rows: list[Row]) -> list[Row]:
    """Eligible cells, least time per token first, less memory before more."""
    return sorted(eligible(rows), key=lambda row: (row["tpot_s"], row["budget_bytes"]))


def print_sweep(rows: list[Row], settings: list[str]) -> None:
    """Both tables, and what is not in them."""
    console, best = Console(soft_wrap=False), fastest(rows)
    if best:
        console.print(_table(f"{min(SHOWN, len(best))} fastest of {len(rows)} cells", best[:SHOWN], settings))
        console.print(_table("Pareto front: time per token against expert memory", front(rows), settings))
    wrong = Counter(row["error"] for row in rows if row["error"])
    left_out = len(rows) - wrong.total() - len(best)
    if left_out:
        print(f"{left_out} cells of oracles and lossy policies are in the file, not in these tables")
    for error, count in wrong.most_common(SHOWN):
        print(f"{count} {'cell has' if count == 1 else 'cells have'} no figures: {error}")
    if len(wrong) > SHOWN:
        print(f"{len(wrong) - SHOWN} more reasons stand in the column `error`")
    if any(not row["calibrated"] for row in best):
        print("note: uncalibrated: some numbers of these machines nobody measured on one")


def _machine(row: Row) -> tuple[str, str]:
    return row["hardware"], row["link"]


def _name(row: Row, settings: list[str]) -> str:
    own = (f"{key.partition('.')[2]}={row[key]}" for key in settings if row[key] is not None)
    return " ".join((row["policy"], *own))


def _table(title: str, rows: list[Row], settings: list[str]) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left", title_style="bold")
    for heading in ("policy", "machine", "link", "budget"):
        table.add_column(heading)
    for heading in ("GiB", "ms/token", "bound", "hit"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            _name(row, settings), row["hardware"], row["link"], row["budget"], f"{row['budget_bytes'] / 2**30:.2f}",
            _ms(row["tpot_s"]), _ms(row["clairvoyant_bound_tpot_s"]), f"{row['hit']:.3f}",
        )  # fmt: skip
    return table


def _ms(time_s: Any) -> str:
    return "" if time_s is None else f"{time_s * 1e3:,.2f}"
