"""`moeflow runtime bench`: how fast a model runs on this machine under each of several policies."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import InputError
from ..traces.bundled import BUNDLED_TRACE, TINY_MOE
from .generate_command import check_new_file, prepare_torch

if TYPE_CHECKING:
    from rich.table import Table


def bench(
    model: Annotated[
        str,
        typer.Argument(
            help="Checkpoint folder, hub id, or a bundled spec's name: a model of its size with random weights; "
            "default: the bundled model."
        ),
    ] = "",
    trace: Annotated[
        Path | None, typer.Option(help="Routing to force on the model (Parquet) [default: the bundled recording].")
    ] = None,
    policy: Annotated[str, typer.Option(help="Policies to compare, with commas: files or bundled names.")] = "lru",
    budget: Annotated[
        str, typer.Option(help="Expert slots with scratch: 20GiB, 512 (slots), a fraction, or auto.")
    ] = "0.25",
    ram: Annotated[
        str | None, typer.Option(help="Host memory for experts: 4GiB; the rest is read from the checkpoint.")
    ] = None,
    shrink: Annotated[int, typer.Option(help="Divide every width of a random model by this.", min=1)] = 1,
    limit: Annotated[int, typer.Option(help="Only the first N requests of the trace; 0 = all.", min=0)] = 4,
    batch: Annotated[
        int | None, typer.Option(help="Requests that advance in lockstep [default: the recorded batches].")
    ] = None,
    rounds: Annotated[int, typer.Option(help="How often every policy runs, in turn.", min=1)] = 3,
    timeline: Annotated[
        Path | None, typer.Option(help="Also write a timeline of the first policy (JSON, for ui.perfetto.dev).")
    ] = None,
    nvtx: Annotated[bool, typer.Option("--nvtx", help="NVTX ranges, for profilers (NVIDIA).")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of the table.")] = False,
) -> None:
    """Compare policies on one model in one run, routed as a trace says, beside the fully resident model."""
    from ..policies.policy import Policy

    names = [name.strip() for name in policy.split(",") if name.strip()]
    if not names:
        raise InputError("--policy: names no policy; give one, or several with commas")
    check_new_file(timeline, "--timeline")
    policies = [Policy.load(name) for name in names]
    prepare_torch("measuring a live model")
    routing = recording(trace or BUNDLED_TRACE, limit, batch)
    from ..traces.timeline import chrome_trace
    from ..traces.whole_file import write_whole
    from .bench import bench as measured
    from .devices import backend_for, default_device
    from .nvtx import check_nvtx
    from .offload import servable
    from .subject import load_subject

    if nvtx:
        check_nvtx()
    for each in policies:
        servable(each)
    subject, shown = load_subject(model or str(TINY_MOE), shrink, ram, backend_for(default_device()), routing)

    def written(seen: Any) -> None:
        assert timeline is not None
        title = f"moeflow runtime: {shown} on {subject.backend.device}, {policies[0].name}"
        write_whole(timeline, chrome_trace(seen.spans(), title).encode())

    found = measured(
        subject, shown, routing, policies, budget, rounds, lambda line: print(line, file=sys.stderr, flush=True),
        written if timeline is not None else None, nvtx,
    )  # fmt: skip
    if as_json:
        print(json.dumps(found, indent=2))
        return
    show(found)


def recording(path: Path, limit: int, batch: int | None) -> Any:
    """The trace to force, its first `limit` requests, in batches of `batch`. Raises InputError."""
    import numpy as np

    from ..traces.lockstep import lockstep
    from ..traces.reader import load_trace

    trace = load_trace(path)
    if not trace.rows:
        raise InputError(f"{path}: holds no rows, so there is nothing to run")
    if limit:
        _, first = np.unique(trace.request, return_index=True)
        trace = trace.of_requests(trace.request[np.sort(first)[:limit]].tolist())
    return trace if batch is None else lockstep(trace, batch)


def show(found: dict[str, Any]) -> None:
    """The figures of `bench` as tables."""
    from rich.console import Console

    trace, model = found["trace"], found["model"]
    print(
        f"{model['name']} on {found['device']} ({found['threads']} host threads), budget {found['budget']}, "
        f"link {found['link_bytes_per_s'] / 1e9:,.2f} GB/s; routing of {trace['requests']} requests of "
        f"{trace['model']}: {trace['tokens']} tokens in {trace['passes']} passes, {found['rounds']} rounds"
    )
    Console(soft_wrap=False).print(_table(found))
    for note in found["notes"]:
        print(f"note: {note}")


def _table(found: dict[str, Any]) -> Table:
    """A column per policy, so that any number of figures fits a terminal."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    resident, runs = found["resident"], found["policies"]
    columns = ([] if resident is None else [resident]) + runs
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("medians over rounds", no_wrap=True)
    for name in ([] if resident is None else ["resident"]) + [run["name"] for run in runs]:
        table.add_column(name, justify="right")
    for heading, figure in FIGURES.items():
        table.add_row(heading, *(figure(of) for of in columns))
    for heading, key in ((f"pace to {runs[0]['name']}", "pace_to_first"), ("pace to resident", "pace_to_resident")):
        paces = [of.get(key) for of in columns]
        table.add_row(heading, *("-" if pace is None else f"{pace['median']:.3f}" for pace in paces))
        table.add_row("  least, most", *(_range(pace) for pace in paces))
    return table


def _range(pace: dict[str, float] | None) -> str:
    return "-" if pace is None else f"{pace['min']:.3f}, {pace['max']:.3f}"


def _only_offloaded(figure: Callable[[dict[str, Any]], str]) -> Callable[[dict[str, Any]], str]:
    return lambda of: figure(of) if "hit" in of else "-"


def _share(name: str) -> Callable[[dict[str, Any]], str]:
    return _only_offloaded(lambda of: f"{of[name] * 100:.1f}")


def _moved(kind: str) -> Callable[[dict[str, Any]], str]:
    return _only_offloaded(lambda of: f"{of['bytes_per_token'][kind] / 1e6:,.3f}")


FIGURES: dict[str, Callable[[dict[str, Any]], str]] = {
    "tokens/s": lambda of: f"{of['tokens_per_s']:,.2f}",
    "ms per token, mean": lambda of: f"{of['tpot_s']['mean'] * 1e3:,.2f}",
    "  99 of 100 below": lambda of: f"{of['tpot_s']['p99'] * 1e3:,.2f}",
    "ms to first token": lambda of: "-" if of["ttft_s"] is None else f"{of['ttft_s']['p50'] * 1e3:,.1f}",
    "exposed wait, ms per token": _only_offloaded(lambda of: f"{of['wait_s_per_token'] * 1e3:,.3f}"),
    **{f"{share}, % of needed experts": _share(share) for share in ("hit", "late", "miss")},
    **{f"MB per token, {kind}": _moved(kind) for kind in ("demand", "stream", "prefetch", "wasted")},
    "copy time hidden": _only_offloaded(lambda of: f"{of['overlap']:.0%}"),
    "host us per layer": _only_offloaded(lambda of: f"{sum(of['host_us_per_layer'].values()):,.0f}"),
    "  of which decisions": _only_offloaded(lambda of: f"{of['host_us_per_layer']['decide']:,.0f}"),
    "syncs per layer": _only_offloaded(lambda of: f"{of['syncs_per_layer']:.2f}"),
    "share of physical limit": _only_offloaded(lambda of: f"{of['limit']['share']:.1%}"),
}
