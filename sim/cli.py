"""`sim`: replay a trace on modelled hardware."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import InputError, run_command
from ..policies.policy_command import app as policies_app
from .hw_command import app as hw_app

if TYPE_CHECKING:
    from .result import Result

app = typer.Typer(
    help="Replay recorded MoE routing on modelled hardware.", no_args_is_help=True, pretty_exceptions_enable=False
)
app.add_typer(hw_app, name="hw")
app.add_typer(policies_app, name="policies")


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
    with _Progress() as progress:
        result = simulate(
            trace, hw, policy, budget, vram=vram, max_context=max_context, ram=ram, host_memory=host_memory,
            pinned=pinned, model=model, link=link, storage=storage, near_memory=near_memory, fitted=fitted,
            batch=batch, timeline_steps=timeline_steps, progress=progress.update,
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
    from .summary_plot import summary_png
    from .timeline import chrome_trace

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


class _Progress:
    """A bar on a terminal, a line per tenth elsewhere; on stderr, so that stdout stays the answer."""

    def __enter__(self) -> _Progress:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(stderr=True)
        self._bar = None
        self._tenths = 0
        if console.is_terminal:
            columns = (TextColumn("simulating"), BarColumn(), MofNCompleteColumn(), TextColumn("steps"))
            self._bar = Progress(*columns, TimeRemainingColumn(), console=console, transient=True)
            self._bar.start()
            self._task = self._bar.add_task("steps", total=None)
        return self

    def update(self, done: int, total: int) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=total)
        elif done * 10 // total > self._tenths:
            self._tenths = done * 10 // total
            print(f"simulated {done} of {total} steps", file=sys.stderr)

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()


def main() -> None:
    """Entry point of the `sim` command."""
    run_command(app)
