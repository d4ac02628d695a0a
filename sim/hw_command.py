"""`sim hw list` and `sim hw show`: the bundled hardware profiles and where their numbers come from."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import InputError
from ..hwprofiles.profile import (
    Document,
    Hardware,
    Link,
    NearMemory,
    Storage,
    calibrated,
    list_profiles,
    load_document,
    load_documents,
    load_hardware,
    load_link,
    load_near_memory,
    load_storage,
)

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

app = typer.Typer(help="Hardware profiles: machines, links, storage and near memory.", no_args_is_help=True)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON in SI units.")]
SCALES = {
    "FLOP/s": ((1e12, "TFLOP/s"), (1e9, "GFLOP/s")),
    "B/s": ((1e9, "GB/s"),),
    "B": ((2**30, "GiB"), (2**10, "KiB"), (1, "B")),
    "s": ((1e-3, "ms"), (1e-6, "us")),
    "1": ((1, ""),),
}


@app.command("list")
def list_command(as_json: AsJson = False) -> None:
    """Show the bundled machines, links, storages and near-memory units."""
    names = list_profiles()
    machines = [load_hardware(name) for name in names["machine"]]
    links = [load_link(name) for name in names["link"]]
    storages = [load_storage(name) for name in names["storage"]]
    units = [load_near_memory(name) for name in names["near_memory"]]
    if as_json:
        rows = {
            "machine": [_machine_row(machine) for machine in machines],
            "link": [asdict(link) for link in links],
            "storage": [asdict(storage) for storage in storages],
            "near_memory": [asdict(unit) for unit in units],
        }
        print(json.dumps(rows, indent=2))
        return
    console = _console()
    for table in (_machine_table(machines), _link_table(links), _storage_table(storages), _near_table(units)):
        console.print(table)
        console.print()
    console.print("Rates are peaks for machines and reached rates for links. `sim hw show NAME` gives every number")
    console.print("with its kind and source; docs/hardware.md tells how to write a profile of your own.")


@app.command("show")
def show_command(
    name: Annotated[str, typer.Argument(help="A bundled name or a YAML file.")],
    link: Annotated[str | None, typer.Option(help="Show a machine with another link.")] = None,
    storage: Annotated[str | None, typer.Option(help="Show a machine with another storage.")] = None,
    near_memory: Annotated[str | None, typer.Option(help="Show a machine with a near-memory unit.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show every number of a profile with its unit, kind and source."""
    document = load_document(name)
    if document.kind == "machine":
        parts = load_documents(document, link, storage, near_memory)
    elif link or storage or near_memory:
        raise InputError(
            f"{document.file}: is a {document.kind}; --link, --storage and --near-memory go with a machine"
        )
    else:
        parts = {document.kind: document}
    if as_json:
        print(json.dumps(_profile(document, parts), indent=2, ensure_ascii=False))
        return
    console = _console()
    for part in parts.values():
        console.print(_profile_table(part))
        console.print()
    if not _calibrated(parts):
        console.print("[yellow]uncalibrated[/]: nobody measured all of this on one machine; predictions say so")


def _calibrated(parts: dict[str, Document]) -> bool:
    return calibrated(parts) if "machine" in parts else all(part.values["calibrated"] for part in parts.values())


def _profile(document: Document, parts: dict[str, Document]) -> dict[str, Any]:
    return {
        "name": document.name,
        "kind": document.kind,
        "description": document.values["description"],
        "calibrated": _calibrated(parts),
        **({"measured_on": document.values["measured_on"]} if "measured_on" in document.values else {}),
        **{key: document.values[key] for key in ("dispatch",) if key in document.values},
        **({"unified_memory": document.values["device"]["unified_memory"]} if "device" in document.values else {}),
        "documents": {kind: part.file for kind, part in parts.items()},
        "numbers": {path: quantity for part in parts.values() for path, quantity in _numbers(part)},
    }


def _numbers(part: Document) -> Iterator[tuple[str, dict[str, Any]]]:
    prefix = "" if part.kind == "machine" else f"{part.kind}."
    for path, quantity in part.quantities():
        yield prefix + path, quantity


def _profile_table(part: Document) -> Table:
    table = _table(f"{part.kind} [bold]{part.name}[/] · {part.file}")
    table.caption = part.values["description"] + (
        f", {part.values['dispatch']} dispatch" if part.kind == "machine" else ""
    )
    table.add_column("number", no_wrap=True)
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("unit", no_wrap=True)
    table.add_column("kind", no_wrap=True)
    table.add_column("source", ratio=1)
    group = ""
    for path, quantity in part.quantities():
        its_group = path.rpartition(".")[0]
        if group and its_group != group:
            table.add_section()
        group = its_group
        value, unit = _human(quantity)
        table.add_row(path, value, unit, _kind(quantity["kind"]), _source(quantity))
    return table


def _source(quantity: dict[str, Any]) -> Any:
    from rich.text import Text

    note = f" ({quantity['note']})" if "note" in quantity else ""
    return Text.assemble(quantity["source"], (note, "dim"))


def _kind(kind: str) -> str:
    colour = {"measured": "green", "datasheet": "cyan", "derived": "blue", "estimate": "yellow"}[kind]
    return f"[{colour}]{kind}[/]"


def _human(quantity: dict[str, Any]) -> tuple[str, str]:
    """A number in the largest unit that keeps it at 1 or above."""
    value, scales = quantity["value"], SCALES[quantity["unit"]]
    scale, unit = next(((s, u) for s, u in scales if abs(value) >= s), scales[-1])
    return f"{value / scale:.4g}", unit


def _machine_table(machines: list[Hardware]) -> Table:
    table = _table("machines")
    table.add_column("name", style="bold", no_wrap=True)
    for title in ("TFLOP/s", "GiB", "GB/s"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("link", no_wrap=True)
    table.add_column("GB/s", justify="right", no_wrap=True)
    table.add_column("calibrated", no_wrap=True)
    table.add_column("what it is", ratio=1)
    for machine in machines:
        device = machine.device
        table.add_row(
            machine.name,
            f"{device.flops / 1e12:.4g}",
            f"{device.memory_bytes / 2**30:.1f}",
            f"{device.memory_bandwidth / 1e9:.0f}",
            machine.link.name,
            f"{machine.link.h2d.bandwidth / 1e9:.4g}",
            _yes(machine.calibrated),
            machine.description,
        )
    return table


def _link_table(links: list[Link]) -> Table:
    table = _table("links")
    table.add_column("name", style="bold", no_wrap=True)
    for title in ("to device GB/s", "pageable GB/s", "to host GB/s", "alpha us", "submit us", "batched us"):
        table.add_column(title, justify="right")
    table.add_column("calibrated", no_wrap=True)
    for link in links:
        rates = (link.h2d.bandwidth, link.h2d.pageable_bandwidth or 0.0, link.d2h.bandwidth)
        times = (link.h2d.alpha_s, link.submit_s, link.submit_batched_s)
        numbers = [f"{rate / 1e9:.4g}" for rate in rates] + [f"{time * 1e6:.3g}" for time in times]
        table.add_row(link.name, *numbers, _yes(link.calibrated))
    return table


def _storage_table(storages: list[Storage]) -> Table:
    table = _table("storage")
    table.add_column("name", style="bold", no_wrap=True)
    for title in ("read GB/s", "latency us", "block KiB", "queue depth"):
        table.add_column(title, justify="right")
    table.add_column("calibrated", no_wrap=True)
    for storage in storages:
        table.add_row(
            storage.name,
            f"{storage.read_bandwidth / 1e9:.4g}",
            f"{storage.latency_s * 1e6:.3g}",
            f"{storage.block_bytes / 1024:.4g}",
            str(storage.queue_depth),
            _yes(storage.calibrated),
        )
    return table


def _near_table(units: list[NearMemory]) -> Table:
    table = _table("near memory")
    table.add_column("name", style="bold", no_wrap=True)
    for title in ("internal GB/s", "TFLOP/s", "GiB", "in GB/s", "out GB/s", "alpha us"):
        table.add_column(title, justify="right")
    table.add_column("calibrated", no_wrap=True)
    for unit in units:
        table.add_row(
            unit.name,
            f"{unit.internal_bandwidth / 1e9:.4g}",
            f"{unit.flops / 1e12:.4g}",
            f"{unit.capacity_bytes / 2**30:.4g}",
            f"{unit.write_bandwidth / 1e9:.4g}",
            f"{unit.read_bandwidth / 1e9:.4g}",
            f"{unit.alpha_s * 1e6:.3g}",
            _yes(unit.calibrated),
        )
    return table


def _machine_row(machine: Hardware) -> dict[str, Any]:
    return {
        "name": machine.name,
        "description": machine.description,
        "calibrated": machine.calibrated,
        "flops": machine.device.flops,
        "memory_bytes": machine.device.memory_bytes,
        "memory_bandwidth": machine.device.memory_bandwidth,
        "link": machine.link.name,
        "link_bandwidth": machine.link.h2d.bandwidth,
        "storage": machine.storage.name,
    }


def _table(title: str) -> Table:
    from rich import box
    from rich.table import Table

    return Table(
        title=title,
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        show_edge=False,
    )


def _yes(flag: bool) -> str:
    return "[green]yes[/]" if flag else "[yellow]no[/]"


def _console() -> Console:
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 100, highlight=False)
