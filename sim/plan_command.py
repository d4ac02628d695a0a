"""`sim plan`: the table, the advice and the files."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import InputError

if TYPE_CHECKING:
    from rich.table import Table

    from .plan import Plan


def plan(
    model: Annotated[str, typer.Option(help="Model: a bundled name, a YAML file or a config.json.")],
    hw: Annotated[str, typer.Option(help="Machine: a bundled name (`sim hw list`) or a YAML file.")],
    ram: Annotated[str | None, typer.Option(help="Host memory for experts [default: the machine's].")] = None,
    vram: Annotated[str | None, typer.Option(help="Device memory [default: the machine's].")] = None,
    context: Annotated[int, typer.Option(help="Tokens of KV cache to keep free.")] = 8192,
    trace: Annotated[
        Path | None, typer.Option(help="Routing recorded from the model [default: surrogate routing].")
    ] = None,
    link: Annotated[str | None, typer.Option(help="Another host link than the machine's own.")] = None,
    storage: Annotated[str | None, typer.Option(help="Another SSD than the machine's own.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for policy.yaml, run-llama.sh, run-ktransformers.sh and plan.json.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print plan.json instead of the table.")] = False,
) -> None:
    """Before any download: will expert offloading work here, with which settings, how far from the limit?"""
    from rich.console import Console

    from .plan import make_plan
    from .plan_advice import moeflow_command
    from .plan_files import contents, write_plan

    if out is not None and out.exists() and not out.is_dir():
        raise InputError(f"--out {out}: it is a file; name a folder")
    with Console(stderr=True).status("simulating") as status:
        made = make_plan(
            model, hw, vram=vram, ram=ram, context=context, trace=trace, link=link, storage=storage,
            progress=lambda what: status.update(f"simulating {what}"),
        )  # fmt: skip
    if out is not None:
        write_plan(made, out)
    if as_json:
        print(contents(made)["plan.json"], end="")
        return
    asked = {"--trace": "mine.parquet" if trace is None else str(trace), "--model": model, "--hw": hw, "--link": link}
    asked |= {"--storage": storage, "--vram": vram or "auto", "--ram": ram}
    policy = str(out / "policy.yaml") if out is not None else ""
    _print(made, lambda preset: moeflow_command(made, asked, policy or preset))
    if out is not None:
        print(f"wrote {', '.join(str(out / name) for name in contents(made))}")


def _print(made: Plan, moeflow: Any) -> None:
    from rich.console import Console

    from .plan_advice import advice, comment, ktransformers_options, llama_options, settings

    console = Console(width=None if sys.stdout.isatty() else 88, highlight=False, soft_wrap=False, markup=False)
    values = made.values
    hardware = values["hardware"]
    console.print(comment(f"{values['model']} on {hardware['name']} over {hardware['link']}: {_fit(values['memory'])}"))
    console.print(_table(values))
    for row in values["rows"]:
        if row["refused"] not in (None, "not needed, all experts fit"):
            console.print(f"no {row['title']}: {row['refused']}")
    for sentence in advice(made):
        console.print(sentence)
    if not hardware["calibrated"]:
        console.print(f"note: uncalibrated: {hardware['name']} has numbers that nobody measured on such a machine")
    print("\nllama.cpp      " + shlex.join(llama_options(made)))
    print("KTransformers  " + shlex.join(ktransformers_options(made)))
    print("moeflow        " + moeflow(settings(made)["moeflow"]))


def _fit(memory: dict[str, Any]) -> str:
    size = {name: memory[f"{name}_bytes"] / 2**30 for name in ("device", "dense", "kv", "workspace", "routed", "ram")}
    held = memory["slots"] * memory["bytes_per_expert"] / 2**30
    return (
        f"of {size['device']:.1f} GiB, dense weights take {size['dense']:.2f}, KV cache for {memory['context']} tokens "
        f"{size['kv']:.2f}, workspace {size['workspace']:.2f}; room for {memory['slots']} of {memory['experts']} "
        f"experts ({held:.1f} of {size['routed']:.1f} GiB), host memory {size['ram']:.1f} GiB"
    )


def _table(values: dict[str, Any]) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    routing = values["routing"]
    prompt = routing["prompt_tokens"]
    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column(f"{routing['kind']} routing", no_wrap=True)
    for heading in ("tokens/s", "interval", f"TTFT s\n{prompt} tokens", "device\nGiB", "host\nGiB", "wait", "hit"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in values["rows"]:
        if row["refused"] is not None:
            table.add_row(row["title"], *["-"] * 7)
            continue
        ttft = "-" if row["ttft_s"] is None else f"{row['ttft_s']:.2f}"
        between = _between(row["interval"])
        gib = (f"{row[name] / 2**30:.1f}" for name in ("device_bytes", "host_bytes"))
        shares = (f"{row[name]:.0%}" for name in ("wait_share", "hit"))
        mark = " *" if row["way"] == values["best"] else ""
        table.add_row(row["title"] + mark, _short(row["tokens_per_s"]), between, ttft, *gib, *shares)
    table.caption = f"* best; intervals: {routing['interval']}"
    table.caption_justify = "left"
    return table


def _between(interval: list[float] | None) -> str:
    if interval is None:
        return "too short"
    low, high = interval
    return "fixed" if low == high else f"{_short(low)} - {_short(high)}"


def _short(rate: float) -> str:
    return f"{rate:.1f}" if rate >= 1 else f"{rate:.2f}"
