"""`sim`: replay a trace on modelled hardware."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import InputError, run_command
from ..policies.policy_command import app as policies_app
from .compare_command import compare
from .hw_command import app as hw_app
from .mrc_command import mrc
from .plan_command import plan
from .progress import Progress
from .sweep_command import sweep
from .tune_command import tune

if TYPE_CHECKING:
    from .result import Result

app = typer.Typer(
    help="Replay recorded MoE routing on modelled hardware.", no_args_is_help=True, pretty_exceptions_enable=False
)
app.add_typer(hw_app, name="hw")
app.add_typer(policies_app, name="policies")
app.command()(sweep)
app.command()(compare)
app.command()(tune)
app.command()(plan)
app.command()(mrc)


@app.callback()
def _sim() -> None:
    """Replay recorded MoE routing on modelled hardware."""


@app.command()
def run(
    hw: Annotated[str, typer.Option(help="Machine: a bundled name (`sim hw list`) or a YAML file.")],
    trace: Annotated[Path | None, typer.Option(help="Routing trace [default: the bundled recording].")] = None,
    policy: Annotated[str, typer.Option(help="Policy: a YAML file or a bundled name.")] = "moeflow",
    budget: Annotated[
        str | None,
        typer.Option(help="Expert slots with scratch: 20GiB, 512 (slots), a fraction, or auto [default: 0.25]."),
    ] = None,
    vram: Annotated[
        str | None, typer.Option(help="Whole device memory instead of --budget: 24GiB, or auto for all of it.")
    ] = None,
    max_context: Annotated[
        int | None, typer.Option(help="Tokens of KV cache that --vram keeps free [default: the trace's longest].")
    ] = None,
    ram: Annotated[
        str | None, typer.Option(help="Host memory for experts; the rest goes to SSD [default: all of the host's].")
    ] = None,
    fitted: Annotated[
        Path | None, typer.Option(help="Fitted file of the policy's predictor (`moeflow policies train`).")
    ] = None,
    batch: Annotated[
        int | None, typer.Option(help="Requests that advance in lockstep [default: the recorded batches].")
    ] = None,
    devices: Annotated[int, typer.Option(help="Devices of the machine, each with its own link and budget.")] = 1,
    parallel: Annotated[
        str | None, typer.Option(help="How devices share the model: layer (runs of layers) or expert [default: layer].")
    ] = None,
    batching: Annotated[
        str, typer.Option(help="recorded steps, or continuous: steps that requests form as they arrive.")
    ] = "recorded",
    token_budget: Annotated[
        int | None, typer.Option(help="Tokens of a step in continuous batching at most [default: 2048].")
    ] = None,
    arrivals: Annotated[
        str | None,
        typer.Option(
            help="When requests arrive: trace, poisson:RATE (per second) or a JSONL file "
            "[default: the trace's, as far as it has any]."
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of --arrivals poisson:RATE [default: 0].")] = None,
    host_memory: Annotated[str, typer.Option(help="How experts lie in host memory: pinned or pageable.")] = "pinned",
    pinned: Annotated[
        str | None, typer.Option(help="How much of host memory's experts is pinned: 16GiB [default: all].")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Model whose sizes price the trace: a name, YAML or config.json [default: the recorded one]."
        ),
    ] = None,
    link: Annotated[str | None, typer.Option(help="Another host link than the machine's own.")] = None,
    storage: Annotated[str | None, typer.Option(help="Another SSD than the machine's own.")] = None,
    engine: Annotated[
        str, typer.Option(help="auto, events or compiled; results are the same [auto: compiled where it can be].")
    ] = "auto",
    near_memory: Annotated[
        str | None, typer.Option(help="A near-memory unit instead of the machine's own, or where it has none.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for result.json, timeline.json and summary.png.")] = Path("sim-out"),
    timeline_steps: Annotated[int, typer.Option(min=0, help="How many steps the timeline covers.")] = 40,
    as_json: Annotated[bool, typer.Option("--json", help="Print result.json instead of the table.")] = False,
    print_config: Annotated[bool, typer.Option(help="Print the resolved policy document and stop.")] = False,
) -> None:
    """Replay a trace on one machine; print a table, write result.json, a Perfetto timeline and a summary plot."""
    from .run import load_policy, simulate

    if print_config:
        import yaml

        print(yaml.safe_dump(load_policy(policy).document, sort_keys=False), end="")
        return
    _writable(out)
    with Progress() as progress:
        result = simulate(
            trace, hw, policy, budget, vram=vram, max_context=max_context, ram=ram, host_memory=host_memory,
            pinned=pinned, model=model, link=link, storage=storage, near_memory=near_memory, fitted=fitted,
            batch=batch, devices=devices, parallel=parallel, batching=batching, token_budget=token_budget,
            arrivals=arrivals, seed=seed, engine=engine, timeline_steps=timeline_steps, progress=progress.update,
            notice=progress.notice,
        )  # fmt: skip
    _write(result, out)
    if as_json:
        print(result.to_json(), end="")
        return
    from .table import print_result

    print_result(result)
    print(f"wrote {out / 'result.json'}, {out / 'summary.png'} and {out / 'timeline.json'} (for ui.perfetto.dev)")


def _writable(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--out {folder}: it is a file; name a folder")


def _write(result: Result, folder: Path) -> None:
    """Each file under a temporary name first, then renamed: nobody ever sees half of one."""
    from ..traces.timeline import chrome_trace
    from .summary_plot import summary_png

    values = result.values
    title = f"moeflow sim: {values['model']['name']} on {values['hardware']['name']}, {values['policy']['name']}"
    contents = {
        "summary.png": summary_png(result),
        "timeline.json": chrome_trace(result.measurements.spans, title).encode(),
        "result.json": result.to_json().encode(),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            part = folder / f".{name}.part"
            try:
                part.write_bytes(content)
                part.replace(folder / name)
            finally:
                part.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"--out {folder}: cannot write there ({error.strerror}); choose another folder") from None


def main() -> None:
    """Entry point of the `sim` command."""
    run_command(app)
