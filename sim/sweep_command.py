"""`sim sweep`: one trace under many policies, budgets, machines and links."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .progress import Progress

if TYPE_CHECKING:
    from .grid import Cell
    from .sweep import Row


def sweep(
    hw: Annotated[str, typer.Option(help="Machines: bundled names or YAML files, a,b,c.")],
    trace: Annotated[Path | None, typer.Option(help="Routing trace [default: the bundled recording].")] = None,
    policy: Annotated[str, typer.Option(help="Policies: bundled names or YAML files, a,b,c.")] = "moeflow",
    budget: Annotated[str, typer.Option(help="Budgets as for `sim run`, a,b,c.")] = "0.25",
    link: Annotated[str | None, typer.Option(help="Host links in place of the machines' own, a,b,c.")] = None,
    distance: Annotated[str | None, typer.Option(help="Prefetch distances, a,b,c: --set prefetch.distance.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="A key of the policy document and its values: cache.half_life=4,16,64."),
    ] = None,
    ram: Annotated[str | None, typer.Option(help="Host memory for experts, as for `sim run`.")] = None,
    batch: Annotated[int | None, typer.Option(help="Requests that advance in lockstep, as for `sim run`.")] = None,
    host_memory: Annotated[str, typer.Option(help="How experts lie in host memory: pinned or pageable.")] = "pinned",
    model: Annotated[str | None, typer.Option(help="Model whose sizes price the trace, as for `sim run`.")] = None,
    out: Annotated[Path, typer.Option(help="The Parquet file; a journal is kept beside it until then.")] = Path(
        "sweep.parquet"
    ),
    jobs: Annotated[int | None, typer.Option(min=1, help="Processes [default: one for each core].")] = None,
    executor: Annotated[str, typer.Option(help="Where cells are computed: local, or dask://HOST:PORT.")] = "local",
    as_json: Annotated[bool, typer.Option("--json", help="Print the rows instead of tables.")] = False,
) -> None:
    """Replay a trace under every combination; write one row each. Interrupted, it continues when run again."""
    from ..traces.bundled import PRICED_AS
    from . import executors
    from .cell import TraceFile
    from .grid import distance_axis, make_grid, parse_axis, parse_list
    from .run import price
    from .sweep import journal_path, run_sweep, writable

    writable(out)
    execute = executors.executor(executor, jobs)
    axes = [*map(parse_axis, settings or ()), *([] if distance is None else [distance_axis(distance)])]
    lists = [parse_list(text, name) for text, name in ((policy, "--policy"), (budget, "--budget"), (hw, "--hw"))]
    links = (None,) if link is None else parse_list(link, "--link")
    priced_as = model or (PRICED_AS if trace is None else None)
    options: dict[str, Any] = {"ram": ram, "batch": batch, "host_memory": host_memory, "model": priced_as}
    file, loaded = TraceFile.of(trace)
    price(loaded, priced_as, str(trace or "bundled"))
    cells = make_grid(lists[0], axes, lists[1], lists[2], links, file.content_sha256, options)
    try:
        with Progress("sweeping", "computed", "cells") as progress:
            rows, failed = run_sweep(cells, file, options, out, execute, progress.update)
    except KeyboardInterrupt:
        print(
            f"interrupted: what was computed is kept in {journal_path(out)}; run the same command again to continue",
            file=sys.stderr,
        )
        raise typer.Exit(130) from None
    if as_json:
        print(json.dumps(rows, indent=2))
    else:
        _report(rows, cells, out, _options(trace, model, ram, batch, host_memory))
    if failed:
        for name in failed:
            print(f"failed: {name}", file=sys.stderr)
        print(
            f"{len(failed)} of {len(rows)} cells failed; the others are in {out}, and the same command tries these "
            "again",
            file=sys.stderr,
        )
        raise typer.Exit(1)


def _report(rows: list[Row], cells: list[Cell], out: Path, options: list[str]) -> None:
    """The tables, the fastest cell's policy as a document, and the command that looks at that cell more closely."""
    import yaml

    from ..traces.whole_file import write_whole
    from .sweep_table import fastest, print_sweep

    print_sweep(rows, list(cells[0].settings))
    print(f"wrote {out}")
    best = fastest(rows)
    if not best:
        return
    cell, document = cells[rows.index(best[0])], out.with_suffix(".yaml")
    text = yaml.safe_dump(json.loads(best[0]["document"]), sort_keys=False)
    write_whole(document, f"# The fastest cell of {out.name}: {cell}.\n{text}".encode())
    link = [] if cell.link is None else ["--link", cell.link]
    command = ["sim", "run", "--hw", cell.machine, *link, "--policy", str(document), "--budget", cell.budget, *options]
    print(f"the fastest cell in detail: {shlex.join(command)}")


def _options(trace: Path | None, model: str | None, ram: str | None, batch: int | None, host_memory: str) -> list[str]:
    """Those of `sim run` that were given."""
    given = {"--trace": trace, "--model": model, "--ram": ram, "--batch": batch}
    words = [word for name, value in given.items() if value is not None for word in (name, str(value))]
    return words + ([] if host_memory == "pinned" else ["--host-memory", host_memory])
