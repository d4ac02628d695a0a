"""`moeflow runtime generate`: continue prompts with a model whose experts move."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import InputError
from ..traces.bundled import TINY_MOE

if TYPE_CHECKING:
    from rich.table import Table


def generate(
    model: Annotated[
        str, typer.Argument(help="Checkpoint folder or Hugging Face model id; default: the bundled model.")
    ] = "",
    prompt: Annotated[list[str] | None, typer.Option(help="Text to continue; several make a batch.")] = None,
    policy: Annotated[str, typer.Option(help="Policy: a YAML file or a bundled name.")] = "moeflow",
    budget: Annotated[
        str | None,
        typer.Option(help="Expert slots with scratch: 20GiB, 512 (slots), a fraction, or auto [default: auto]."),
    ] = None,
    vram: Annotated[str | None, typer.Option(help="Whole device memory instead of --budget: 24GiB.")] = None,
    max_context: Annotated[int | None, typer.Option(help="Tokens of KV cache that --vram and auto keep free.")] = None,
    ram: Annotated[
        str | None, typer.Option(help="Host memory for experts: 4GiB; the rest is read from the checkpoint.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate per prompt.", min=1)] = 64,
    chat: Annotated[bool, typer.Option("--chat", help="Put prompts into the tokenizer's chat template.")] = False,
    record: Annotated[Path | None, typer.Option(help="Also record the routing as a trace (Parquet).")] = None,
    timeline: Annotated[Path | None, typer.Option(help="Also write a timeline (JSON, for ui.perfetto.dev).")] = None,
    nvtx: Annotated[bool, typer.Option("--nvtx", help="NVTX ranges, for profilers (NVIDIA).")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text and table.")] = False,
) -> None:
    """Offload a model's experts, continue prompts greedily, print the text and what the experts did."""
    if not prompt or not all(text.strip() for text in prompt):
        raise InputError("--prompt: is missing or empty; give a text to continue, such as --prompt 'Once upon a time'")
    for path, option in ((record, "--record"), (timeline, "--timeline")):
        check_new_file(path, option)
    prepare_torch("generating")
    from .nvtx import check_nvtx
    from .offload import offload as offloaded
    from .prompts import continue_prompts

    source, budget = model or str(TINY_MOE), "auto" if budget is None else budget
    if nvtx:
        check_nvtx()
    began = time.perf_counter()
    loaded = offloaded(source, policy, budget, vram=vram, ram=ram, max_context=max_context)
    loading = time.perf_counter() - began
    made = continue_prompts(loaded, source, prompt, max_new_tokens, chat, record, timeline, nvtx)
    found = {"model": Path(model).name if model else "tiny-moe", "loading_s": loading, **made}
    if as_json:
        print(json.dumps(found, indent=2))
        return
    for each in found["prompts"]:
        print(each["prompt"] + each["text"] + "\n")
    from rich.console import Console

    console = Console(soft_wrap=False)
    console.print(statistics_table(found))
    for note in found["stats"].get("notes", []):
        print(f"note: {note}")


def statistics_table(found: dict[str, Any]) -> Table:
    """What the experts did during one generation."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    said, rows = found["stats"], max(1, found["tokens_computed"])
    slots, moved = said["slots"], said["bytes"]
    table = Table("", "", box=SIMPLE_HEAD, pad_edge=False, show_header=False)
    table.add_row("policy", f"{said['policy']} on {said['device']}, {said['exactness']}")
    table.add_row("slots", f"{slots['held']} + {slots['scratch']} scratch, {slots['bytes'] / 2**20:,.1f} MiB")
    table.add_row("speed", f"{found['new_tokens_per_s']:,.1f} new tokens/s with the prompt, {found['seconds']:.2f} s")
    table.add_row("hit, late, miss", " ".join(f"{said[name]:.1%}" for name in ("hit", "late", "miss")))
    kinds = ("demand", "stream", "prefetch", "wasted", "padding")
    table.add_row("MB per token", ", ".join(f"{kind} {moved[kind] / rows / 1e6:,.3f}" for kind in kinds))
    table.add_row("exposed wait", f"{said['exposed_wait_s'] / rows * 1e3:,.3f} ms per token")
    parts = ", ".join(f"{part} {said[f'{part}_us_per_layer']:,.0f}" for part in ("sync", "decide", "compute"))
    table.add_row("host us per layer", f"{parts}; {said['syncs_per_layer']:.2f} syncs")
    if "disk" in said:
        disk = said["disk"]
        read = f"{disk['experts_read']} read, {disk['bytes_read'] / 1e6:,.1f} MB"
        table.add_row("disk", f"{read}, {'past' if disk['direct'] else 'through'} the page cache")
    return table


def check_new_file(path: Path | None, option: str) -> None:
    """Raises InputError for a file that cannot be written, before anything takes time."""
    if path is None:
        return
    if path.is_dir() or not path.parent.is_dir():
        what = "is a folder" if path.is_dir() else "its folder does not exist"
        raise InputError(f"{option} {path}: {what}; name a file")
    if path.exists():
        raise InputError(f"{option} {path}: exists already; name another file")


def prepare_torch(doing: str) -> None:
    """Raises InputError without the extra `live`; keeps transformers quiet."""
    import sys

    try:
        import torch  # noqa: F401
        from transformers.utils import logging
    except ImportError as error:
        raise InputError(f"{doing} needs {error.name}: pip install 'moeflow[live]'") from None
    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
