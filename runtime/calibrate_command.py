"""`sim hw calibrate`: the front door registers it, so that the simulator need not know of the runtime."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import InputError


def calibrate_command(
    out: Annotated[Path, typer.Option(help="Profile to write; its link and storage go beside it.")],
    device: Annotated[
        str | None, typer.Option(help="As torch names it: cuda:1, npu, cpu [default: the accelerator, else cpu].")
    ] = None,
    disk: Annotated[
        Path | None, typer.Option(help="Folder on the disk that holds the model [default: where --out is].")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the documents as JSON.")] = False,
) -> None:
    """Measure this machine in a few minutes and write its profile, link and storage."""
    try:
        from .calibrate import calibrate
    except ModuleNotFoundError as error:
        if error.name not in ("torch", "transformers"):
            raise
        raise InputError(f"sim hw calibrate needs {error.name}: pip install 'moeflow[live]'") from None
    made = calibrate(out, device, disk, say=lambda line: print(line, file=sys.stderr, flush=True))
    if as_json:
        print(json.dumps(made, indent=2, ensure_ascii=False))
    else:
        print("\n".join(_lines(made, out)))


def _lines(made: dict[str, Any], out: Path) -> list[str]:
    machine, link, storage = made["machine"], made["link"], made["storage"]
    device, h2d = machine["device"], link["h2d"]

    def rate(quantity: dict[str, Any]) -> str:
        return f"{quantity['value'] / 1e9:.4g} GB/s"

    bandwidth = device["memory_bandwidth"]["value"] * device["memory_achieved"]["value"]
    flops = device["flops"]["value"] * device["flops_achieved"]["value"]
    return [
        machine["description"],
        f"experts: {bandwidth / 1e9:.4g} GB/s, {flops / 1e12:.4g} TFLOP/s",
        f"copies: {rate(h2d['bandwidth'])} + {h2d['alpha_s']['value'] * 1e6:.3g} us, "
        f"pageable {rate(h2d['pageable_bandwidth'])}, back {rate(link['d2h']['bandwidth'])}",
        f"host: {rate(machine['host']['memory_bandwidth'])} with copies, "
        f"{machine['host']['cpu_flops']['value'] / 1e12:.4g} TFLOP/s",
        f"disk: {rate(storage['read_bandwidth'])}"
        + f" of {storage['block_bytes']['value'] // 1024} KiB, {storage['queue_depth']['value']} at once",
        "calibrated: " + ", ".join(f"{kind} {'yes' if one['calibrated'] else 'no'}" for kind, one in made.items()),
        f"wrote {out}, {machine['link']} and {machine['storage']} beside it; `sim hw show {out}` shows all of it",
    ]
