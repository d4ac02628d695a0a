"""The command `trace`: look at, check, convert and record routing traces."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import InputError, run_command
from .record_command import record

if TYPE_CHECKING:
    from rich.table import Table

    from .trace import Trace

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Look at, check, convert and record routing traces of Mixture-of-Experts models.",
)
app.command("record")(record)

SERVES = {
    "experts": "every policy",
    "weights": "policies that rank by gate weight",
    "step_ns": "comparing simulated with measured time",
    "lookahead": "prefetch by lookahead",
    "lookahead_weights": "prefetch by lookahead with probabilities",
    "candidates": "policies that change routing (counterfactual)",
    "candidate_logits": "policies that change routing (counterfactual)",
    "sketch": "predictors that read hidden states",
    "probs": "predictors and policies that read the full distribution",
    "embedding": "batch diversity",
}

File = Annotated[Path, typer.Argument(help="A trace (Parquet).", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


@app.command()
def info(file: File, as_json: Json = False) -> None:
    """Show what a trace holds: model, rows, requests, columns, how it was recorded, licence."""
    facts = describe(file)
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    from rich.console import Console

    console = Console()
    console.print(_facts_table(facts))
    console.print(_columns_table(facts))


@app.command()
def check(file: File, as_json: Json = False) -> None:
    """Read every row and say whether the trace is valid; exit status 2 and the first fault if it is not."""
    from .reader import load_trace

    try:
        trace = load_trace(file)
    except InputError as error:
        if as_json:
            print(json.dumps({"file": str(file), "valid": False, "fault": str(error)}, indent=2))
        raise
    notes = _notes(trace)
    if as_json:
        facts = {"file": str(file), "valid": True, "fault": None, "rows": trace.rows}
        print(json.dumps({**facts, "content_sha256": trace.content_sha256, "notes": notes}, indent=2))
        return
    print(f"{file}: valid, {trace.rows:,} rows, content {trace.content_sha256[:16]}")
    for note in notes:
        print(f"note: {note}")


@app.command("import")
def import_(
    source: Annotated[Path, typer.Argument(metavar="IN", help="The recording to convert.", show_default=False)],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="The trace to write.", show_default=False)],
    form: Annotated[str, typer.Option("--format", help="auto, npz, jsonl, vllm, sglang or llamacpp.")] = "auto",
    model: Annotated[
        str | None, typer.Option(help="A known model or a config.json; default: what the recording names.")
    ] = None,
) -> None:
    """Convert a recording of another program into a trace."""
    from .importers import import_trace

    rows = import_trace(source, target, form=form, model=model)
    print(f"{target}: {rows:,} rows")


@app.command()
def export(
    file: File,
    target: Annotated[Path, typer.Argument(metavar="OUT", help="OUT.jsonl or OUT.npz.", show_default=False)],
) -> None:
    """Write a trace as JSONL (a record per token and layer) or as NumPy arrays, by the ending of OUT."""
    from .export import export_trace
    from .reader import load_trace

    export_trace(load_trace(file), target)
    print(f"{target}: written")


def describe(file: Path) -> dict[str, Any]:
    """What `trace info --json` prints. Reads the metadata and the scalar columns only."""
    import numpy as np

    from .reader import read_columns, read_header
    from .trace import PREFILL, REJECTED

    meta, layouts, rows = read_header(file)
    _, scalars = read_columns(file, ("step", "request", "phase", "flags"))
    prefill = int((scalars["phase"] == PREFILL).sum())
    model = meta.model
    return {
        "file": str(file),
        "bytes": file.stat().st_size,
        "decoded_bytes": rows * sum(layout.row_bytes for layout in layouts.values()),
        "model": model.name,
        "moe_layers": len(model.moe_layers),
        "experts": model.experts,
        "top_k": model.top_k,
        "bytes_per_expert": model.bytes_per_expert,
        "routed_bytes": model.routed_bytes,
        "rows": rows,
        "steps": int((np.diff(scalars["step"]) != 0).sum()) + 1 if rows else 0,
        "requests": len(np.unique(scalars["request"])),
        "prefill_tokens": prefill,
        "decode_tokens": rows - prefill,
        "rejected_tokens": int((scalars["flags"] & REJECTED != 0).sum()),
        "lookahead_distances": list(meta.lookahead_distances),
        "columns": {
            name: {"dtype": at.dtype, "shape": list(at.shape), "serves": SERVES.get(name, "")}
            for name, at in layouts.items()
        },
        "recorded": meta.recorded,
        "licence": meta.licence,
    }


def _notes(trace: Trace) -> list[str]:
    """What is allowed but limits what the trace can answer."""
    from .trace import PREFILL

    notes = []
    if not (trace.phase == PREFILL).any():
        notes.append("decode only: time to first token cannot be told from it")
    absent = float((trace.experts == trace.absent).mean()) if trace.rows else 0.0
    if absent:
        notes.append(f"{absent:.2%} of the expert entries are absent")
    unknown = set(trace.request.tolist()) - {request.id for request in trace.meta.requests}
    if unknown:
        notes.append(f"{len(unknown)} of its requests have no record in the metadata")
    if not trace.meta.licence:
        notes.append("no licence is named")
    return notes


def _facts_table(facts: dict[str, Any]) -> Table:
    from rich.table import Table

    table = Table("", "", show_header=False, title=facts["file"], title_justify="left")
    geometry = f"{facts['moe_layers']} MoE layers of {facts['experts']} experts, top-{facts['top_k']}"
    weights = f"{facts['bytes_per_expert'] / 1e6:,.2f} MB each, {facts['routed_bytes'] / 1e9:,.2f} GB together"
    tokens = f"{facts['prefill_tokens']:,} prefill, {facts['decode_tokens']:,} decode"
    rejected = f", {facts['rejected_tokens']:,} rejected" if facts["rejected_tokens"] else ""
    table.add_row("model", f"{facts['model']}: {geometry}")
    table.add_row("experts", weights)
    table.add_row("rows", f"{facts['rows']:,} in {facts['steps']:,} steps of {facts['requests']:,} requests")
    table.add_row("tokens", tokens + rejected)
    table.add_row("size", f"{facts['bytes'] / 1e6:,.1f} MB, {facts['decoded_bytes'] / 1e6:,.1f} MB decoded")
    table.add_row("licence", facts["licence"] or "not named")
    table.add_section()
    for key, value in facts["recorded"].items():
        text = value if isinstance(value, str) else json.dumps(value)
        table.add_row(key, text if len(text) <= 300 else f"{text[:297]}...")
    return table


def _columns_table(facts: dict[str, Any]) -> Table:
    from rich.table import Table

    table = Table("column", "elements", "per row", "serves")
    for name, column in facts["columns"].items():
        table.add_row(name, column["dtype"], " x ".join(map(str, column["shape"])) or "1", column["serves"])
    return table


def main() -> None:
    """Entry point of the console script `trace`."""
    run_command(app)


if __name__ == "__main__":
    main()
