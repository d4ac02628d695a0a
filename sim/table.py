"""A result as a table for people."""

from __future__ import annotations

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from .result import Result


def print_result(result: Result) -> None:
    """Print the figures of one run with its two bounds beside them."""
    values = result.values
    console = Console(soft_wrap=False)
    console.print(f"[bold]{_title(values)}[/bold]", highlight=False)
    console.print(_times(values))
    console.print(_traffic(values))
    if "devices" in values:
        console.print(_devices(values))
    for note in values["notes"]:
        console.print(f"note: {note}", highlight=False, soft_wrap=True)


def _title(values: dict[str, Any]) -> str:
    slots, model = values["slots"], values["model"]
    return (
        f"{model['name']} on {_machine(values['hardware'])} over {values['hardware']['link']}, "
        f"policy {values['policy']['name']}, {slots['held']} + {slots['scratch']} slots of "
        f"{model['bytes_per_expert'] / 2**20:.2f} MiB = {values['budget_bytes'] / 2**30:.2f} GiB"
    )


def _machine(hardware: dict[str, Any]) -> str:
    if "devices" not in hardware:
        return str(hardware["name"])
    return f"{hardware['devices']} x {hardware['name']} ({hardware['parallel']} parallel)"


def _devices(values: dict[str, Any]) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for heading in ("device", "slots", "hit", "late", "miss", "link busy", "computing", "peak GiB"):
        table.add_column(heading, justify="right")
    for index, device in enumerate(values["devices"]):
        shares = (f"{device[share]:.4f}" for share in ("hit", "late", "miss"))
        busy = (f"{device[name]:.1%}" for name in ("link_utilisation", "compute_utilisation"))
        slots = f"{device['slots']['held']} + {device['slots']['scratch']}"
        table.add_row(str(index), slots, *shares, *busy, f"{device['peak_bytes'] / 2**30:.2f}")
    return table


def _times(values: dict[str, Any]) -> Table:
    bounds, tpot = values["bounds"], values["tpot_s"]
    least = () if bounds is None else (bounds["clairvoyant"]["tpot_s"], bounds["resident"]["tpot_s"])
    least_wait = () if bounds is None else (bounds["clairvoyant"]["wait_s_per_token"], 0)
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    continuous = values["batching"]["kind"] == "continuous"
    decode = values["prefill"] or values["ttft_s"] is None
    table.add_column("all steps" if continuous else "decode" if decode else "prefill", no_wrap=True)
    for heading in ("this run", "clairvoyant\nbound", "all resident\nbound")[: 1 + len(least)]:
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_row("time per token, mean", *map(_ms, (tpot["mean"], *least)))
    for quantile in ("p50", "p90", "p99"):
        table.add_row(f"                {quantile}", _ms(tpot[quantile]))
    table.add_row("tokens per second", *(f"{1 / time:,.2f}" for time in (1 / values["tokens_per_s"], *least)))
    table.add_row("exposed wait per token", *map(_ms, (values["wait_s_per_token"], *least_wait)))
    for quantile, time in (values["ttft_s"] or {}).items():
        table.add_row(f"{'time to first token,' if quantile == 'p50' else ' ' * 20} {quantile}", _ms(time))
    for quantile, time in (values["queue_s"] or {}).items():
        table.add_row(f"{'time in the queue,' if quantile == 'p50' else ' ' * 18} {quantile}", _ms(time))
    return table


def _ms(time_s: float) -> str:
    return f"{time_s * 1e3:,.2f} ms"


def _traffic(values: dict[str, Any]) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for heading, justify in (("experts", "left"), ("hit", "right"), ("late", "right"), ("miss", "right")):
        table.add_column(heading, justify=justify)  # type: ignore[arg-type]
    used = values["bytes_per_token"]
    kinds = [kind for kind in used if kind != "low_bit" or used[kind]]
    for kind in kinds:
        table.add_column(f"{kind.replace('_', '-')}\nMB/{'token' if len(kinds) < 5 else 'tok'}", justify="right")
    main = "decode" if values["batching"]["kind"] == "recorded" else "all"
    for name, phase in ((main, values), ("prefill", values["prefill"])):
        if phase:
            moved = (f"{phase['bytes_per_token'][kind] / 1e6:,.1f}" for kind in kinds)
            shares = (f"{phase[share]:.4f}" for share in ("hit", "late", "miss"))
            table.add_row(name, *shares, *moved)
    table.add_section()
    elsewhere = "".join(
        f"{values[share]:.1%} of needed experts {how}, "
        for share, how in (("on_host", "computed on the host"), ("near", "computed near"), ("skipped", "left out"))
        if values[share]
    )
    table.caption = (
        f"{elsewhere}"
        f"link busy {values['link_utilisation']:.1%}, device computing {values['compute_utilisation']:.1%}, "
        f"peak device memory {values['peak_bytes'] / 2**30:.2f} GiB"
    )
    table.caption_justify = "left"
    return table
