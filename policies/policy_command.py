"""`sim policies list|show|train`: which policies there are, what one says in full, and fitting a predictor."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import InputError, run_command

if TYPE_CHECKING:
    from ..traces.trace import Trace
    from .fitted import Fitted

app = typer.Typer(help="Bundled policies.", no_args_is_help=True, pretty_exceptions_enable=False)

SHOWN = ("recall@k", "recall@1.5k", "recall@2k", "precision@k", "exact_set", "union_recall@k")  # JSON has the rest

AsJson = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]


@app.command("list")
def list_policies(as_json: AsJson = False) -> None:
    """Bundled policies: what each needs, and whether it knows the future."""
    from .policy import Policy, preset_names

    policies = [Policy.load(name) for name in preset_names()]
    if as_json:
        rows = [{"name": p.name, "needs": p.needs, "oracle": p.oracle, "summary": p.summary} for p in policies]
        print(json.dumps(rows, indent=2))
        return
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for heading in ("policy", "needs", "what it does"):
        table.add_column(heading)
    for policy in policies:
        table.add_row(policy.name, ", ".join(policy.needs) or "-", policy.summary)
    Console().print(table)
    print(
        "needs: trace columns; `future` is the trace itself, so that policy is an oracle and no live system can run it."
    )


@app.command()
def show(name: Annotated[str, typer.Argument(help="A bundled name or a YAML file.")], as_json: AsJson = False) -> None:
    """The whole resolved document of one policy, and where its parts come from."""
    import yaml

    from .policy import Policy

    policy = Policy.load(name)
    if as_json:
        print(json.dumps({"name": policy.name, "document": policy.document, "needs": policy.needs}, indent=2))
        return
    print(yaml.safe_dump(policy.document, sort_keys=False), end="")
    parts = (policy.eviction(), policy.prefetch(), policy.predictor(), policy.miss_service(), policy.schedule())
    for part in filter(None, parts):
        print(f"\n{type(part).__module__}.{type(part).__name__}\n{_docstring(part)}")


@app.command()
def train(
    kind: Annotated[str, typer.Argument(help="A trained predictor, as named under predict.kind, or layer-budget.")],
    trace: Annotated[Path, typer.Option(help="Routing trace to fit to.")],
    out: Annotated[Path | None, typer.Option(help="The fitted file [default: KIND.safetensors].")] = None,
    hold_out: Annotated[
        str, typer.Option(help="Requests kept for the metrics: odd, even (by order of their ids), or none.")
    ] = "odd",
    as_json: AsJson = False,
) -> None:
    """Fit a predictor, or what cache.split needs to know, to a trace.


    The file says on which requests, how well it does on the others, and its time; a JSON file beside it says the same.
    """
    from ..traces.reader import load_trace

    fit = _trainer(kind)
    fitting, judged = _halves(load_trace(trace), hold_out)
    out = out or Path(f"{kind}.safetensors")
    fitted = fit(fitting, judged)
    fitted.save(out)
    facts = {"file": str(out), "requests": len(fitted.requests), "seconds_per_call": fitted.seconds_per_call}
    report = json.dumps({**facts, "metrics": fitted.metrics}, indent=2)
    _write_beside(out, report)
    if as_json:
        print(report)
        return
    _print_metrics({**facts, **fitted.metrics})


def _print_metrics(metrics: dict[str, Any]) -> None:
    """Single figures a line each; groups of figures as rows of a table, named by where they stand."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    rows = dict(_groups(metrics, ""))
    for name, value in metrics.items():
        if not isinstance(value, dict):
            print(f"{name}: {value:.4g}" if isinstance(value, float) else f"{name}: {value}")
    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("unseen requests", no_wrap=True)
    for column in SHOWN:
        table.add_column(column.replace("@", "\n@").replace("_", " "), justify="right")
    for name, figures in rows.items():
        table.add_row(name, *(f"{figures[column]:.3f}" for column in SHOWN))
    if rows:
        Console().print(table)


def _groups(metrics: dict[str, Any], prefix: str) -> Iterator[tuple[str, dict[str, float]]]:
    """Every group of figures in nested metrics that is about recall."""
    for name, value in metrics.items():
        if isinstance(value, dict):
            where = f"{prefix} {name}".strip().replace("by_distance", "distance")
            if "recall@k" in value:
                yield where, value
            else:
                yield from _groups(value, where)


def _write_beside(file: Path, report: str) -> None:
    """The metrics as JSON, for people."""
    path = file.with_suffix(".json") if file.suffix == ".safetensors" else file.with_name(f"{file.name}.json")
    part = path.with_name(f".{path.name}.part")
    part.write_text(f"{report}\n", encoding="utf-8")
    part.replace(path)


def _trainer(kind: str) -> Callable[[Trace, Trace], Fitted]:
    from . import layer_budget
    from .policy import find_class
    from .predictor import Predictor

    if kind == layer_budget.KIND:
        return layer_budget.train
    cls = find_class(Predictor, kind, "moeflow policies train")
    if not cls.trained:
        raise InputError(f"moeflow policies train {kind}: this predictor has nothing to train; use it as it is")
    return cls.train


def _halves(trace: Trace, hold_out: str) -> tuple[Trace, Trace]:
    """(fitted on, judged on): every second request is held out."""
    import numpy as np

    requests = np.unique(trace.request).tolist()
    if hold_out not in ("odd", "even", "none"):
        raise InputError(f"--hold-out {hold_out!r}: expected odd, even or none")
    held = {"odd": requests[1::2], "even": requests[::2], "none": []}[hold_out]
    kept = [request for request in requests if request not in set(held)]
    if not kept:
        raise InputError("--trace: no request is left to fit to; use --hold-out none or a trace with more requests")
    return trace.of_requests(kept), trace.of_requests(held)


def main() -> None:
    """Entry point of `moeflow policies`."""
    run_command(app)


def _docstring(part: object) -> str:
    import inspect
    import sys

    module = inspect.getdoc(sys.modules[type(part).__module__]) or ""
    return f"{module}\n{inspect.getdoc(type(part)) or ''}".strip()
