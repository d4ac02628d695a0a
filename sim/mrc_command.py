"""`sim mrc`: what every number of slots would miss."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import InputError
from ..traces.whole_file import write_whole

if TYPE_CHECKING:
    from .miss_ratio import MissCurve

PERCENTAGES = range(5, 101, 5)


def mrc(
    trace: Annotated[Path | None, typer.Option(help="Routing trace [default: the bundled recording].")] = None,
    policy: Annotated[str, typer.Option(help="Policies, comma-separated: names or YAML files.")] = "lru,lfu,belady",
    scope: Annotated[str, typer.Option(help="layer: slots of every layer; global: one pool.")] = "layer",
    out: Annotated[Path | None, typer.Option(help="Write the curves as a PNG.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print every capacity as JSON instead of the table.")] = False,
) -> None:
    """Misses at every number of slots, exactly, from one pass over the trace per policy. No clock, no hardware."""
    from ..traces.bundled import BUNDLED_TRACE
    from ..traces.reader import load_trace
    from .miss_ratio import curve_of, stack_scoring
    from .needs import needs_of
    from .run import load_policy

    if out is not None and out.suffix.lower() != ".png":
        raise InputError(f"--out {out}: curves are written as PNG; name a file ending in .png")
    path = BUNDLED_TRACE if trace is None else trace
    loaded = load_trace(path)
    if not loaded.rows:
        raise InputError(f"trace {path}: it has no rows, so there is nothing to replay")
    needs, curves = needs_of(loaded), {}
    for name in dict.fromkeys(policy.split(",")):
        resolved = load_policy(name.strip())
        curves[resolved.name] = curve_of(needs, stack_scoring(resolved, loaded, needs), scope)
    title = f"{loaded.meta.model.name}, trace {path.name}, {len(loaded.step_starts) - 1} steps, scope {scope}"
    if out is not None:
        from .miss_ratio_plot import curve_png

        write_whole(out, curve_png(curves, title), "choose another file")
    if as_json:
        print(json.dumps(_values(curves, path.name, loaded.content_sha256), indent=2))
        return
    _print(curves, title)
    if out is not None:
        print(f"wrote {out}")


def _values(curves: dict[str, MissCurve], trace: str, sha256: str) -> dict[str, Any]:
    """`misses[c]` with c slots per layer or in the pool; `misses_by_layer` where layers have their own."""
    first = next(iter(curves.values()))
    values: dict[str, Any] = {
        "trace": {"name": trace, "sha256": sha256},
        "scope": first.scope,
        "accesses": int(first.accesses.sum()),
        "policies": {name: {"misses": curve.total.tolist()} for name, curve in curves.items()},
    }
    if first.scope == "layer":
        for name, curve in curves.items():
            values["policies"][name]["misses_by_layer"] = curve.misses.tolist()
    return values


def _print(curves: dict[str, MissCurve], title: str) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    first = next(iter(curves.values()))
    most = first.misses.shape[1] - 1
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("experts\nthat fit", justify="right")
    table.add_column("slots per\nlayer" if first.scope == "layer" else "slots in\none pool", justify="right")
    for name in curves:
        table.add_column(f"{name}\nmiss ratio", justify="right", no_wrap=True)
    for percentage in PERCENTAGES:
        slots = most * percentage // 100
        ratios = (f"{curve.ratio[slots]:.4f}" for curve in curves.values())
        table.add_row(f"{percentage} %", str(slots), *ratios)
    console = Console()
    console.print(title, highlight=False)
    console.print(table)
