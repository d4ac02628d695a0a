"""`sim policies list` and `sim policies show`: which policies there are, and what one says in full."""

from __future__ import annotations

import json
from typing import Annotated

import typer

app = typer.Typer(help="Bundled policies.", no_args_is_help=True)

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
    for part in filter(None, (policy.eviction(), policy.prefetch())):
        print(f"\n{type(part).__module__}.{type(part).__name__}\n{_docstring(part)}")


def _docstring(part: object) -> str:
    import inspect
    import sys

    module = inspect.getdoc(sys.modules[type(part).__module__]) or ""
    return f"{module}\n{inspect.getdoc(type(part)) or ''}".strip()
