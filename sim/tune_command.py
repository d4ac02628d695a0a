"""`sim tune`: search for a policy, write it ready to use, and say what it brings on requests not tuned on."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import InputError
from .progress import Progress

if TYPE_CHECKING:
    from ..policies.policy import Policy
    from .tune import Values


def tune(
    hw: Annotated[str, typer.Option(help="Machine: a bundled name (`sim hw list`) or a YAML file.")],
    trace: Annotated[Path | None, typer.Option(help="Routing trace [default: the bundled recording].")] = None,
    link: Annotated[str | None, typer.Option(help="Another host link than the machine's own.")] = None,
    model: Annotated[str | None, typer.Option(help="Model whose sizes price the trace, as for `sim run`.")] = None,
    objective: Annotated[
        str, typer.Option(help="What to make small: time (per token), memory (of experts), link (bytes per token).")
    ] = "time,memory",
    allow: Annotated[
        str | None, typer.Option(help="Miss services beyond exact ones: numeric, lossy [default: none].")
    ] = None,
    vram: Annotated[
        str | None, typer.Option(help="Device memory that experts must fit with all else [default: all of it].")
    ] = None,
    budget_range: Annotated[
        str | None, typer.Option(help="Least and most for experts instead of --vram: 0.1,0.5 or 2GiB,8GiB.")
    ] = None,
    trials: Annotated[int, typer.Option(min=1, help="Runs in all, those of other processes included.")] = 100,
    timeout: Annotated[float | None, typer.Option(min=0, help="Stop searching after so many seconds.")] = None,
    sampler: Annotated[str, typer.Option(help="tpe or nsga2.")] = "tpe",
    seed: Annotated[int, typer.Option(min=0, help="Of the draws, and of the halves that requests are put in.")] = 0,
    storage: Annotated[
        str | None, typer.Option(help="sqlite:///tune.db, or a journal file [default: study.log in --out].")
    ] = None,
    pick: Annotated[str, typer.Option(help="Which of the front: the least time, memory or link, or a trial.")] = "time",
    out: Annotated[Path, typer.Option(help="Folder for policy.yaml and tune.json.")] = Path("tune-out"),
    as_json: Annotated[bool, typer.Option("--json", help="Print tune.json instead of tables.")] = False,
) -> None:
    """Search for a policy and a budget on half of the requests; judge the winner on the other half."""
    from ..hwprofiles.profile import load_hardware
    from ..traces.bundled import BUNDLED_TRACE, PRICED_AS
    from ..traces.reader import load_trace
    from . import tune as tuning
    from .run import price
    from .search_space import allowed_classes

    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out}: it is a file; name a folder")
    objectives = _objectives(objective, tuple(tuning.OBJECTIVES))
    if not pick.isdecimal() and pick not in tuning.OBJECTIVES:
        raise InputError(f"--pick {pick!r}: expected {', '.join(tuning.OBJECTIVES)}, or the number of a trial")
    hardware, allowed = load_hardware(hw, link), allowed_classes(allow)
    loaded = load_trace(trace or BUNDLED_TRACE)
    priced = price(loaded, model or (PRICED_AS if trace is None else None), str(trace or "bundled"))
    slots = tuning.slots_within(loaded, priced, hardware, vram, budget_range)
    halves = tuning.halves(loaded, seed)
    problem = tuning.Problem(loaded, *halves, hardware, priced, objectives, allowed, slots, seed)
    kept = storage or str(out / "study.log")
    try:
        with Progress("tuning", "tried", "trials") as progress:
            found, policy = tuning.tune(problem, out, kept, sampler, trials, timeout, pick, progress.update)
    except KeyboardInterrupt:
        print(f"interrupted: trials are kept in {kept}; run the same command again to continue", file=sys.stderr)
        raise typer.Exit(130) from None
    options = {"--hw": hw, "--link": link, "--trace": trace, "--model": model}
    found["command"] = _command(options, out / "policy.yaml", found["picked"]["budget"])
    _write(out, found, policy, str(trace or "the bundled recording"))
    if as_json:
        print(json.dumps(found, indent=2))
        return
    _print(found)
    print(f"wrote {out / 'policy.yaml'} and {out / 'tune.json'}; on the whole trace: {found['command']}")


def _objectives(text: str, known: tuple[str, ...]) -> tuple[str, ...]:
    chosen = tuple(part.strip() for part in text.split(","))
    wrong = [name for name in chosen if name not in known]
    if wrong:
        raise InputError(f"--objective {text!r}: {wrong[0]!r} is not one of {', '.join(known)}")
    if len(set(chosen)) < len(chosen):
        raise InputError(f"--objective {text!r}: one is named twice; leave it out")
    return chosen


def _command(options: dict[str, Any], policy: Path, budget: str) -> str:
    words = [word for name, value in options.items() if value is not None for word in (name, str(value))]
    return shlex.join(["sim", "run", *words, "--policy", str(policy), "--budget", budget])


def _write(out: Path, found: Values, policy: Policy, trace: str) -> None:
    import yaml

    from ..traces.whole_file import write_whole

    halves, picked = [len(found[half]) for half in ("tuned_on", "judged_on")], found["picked"]
    comment = (
        f"# Tuned on {halves[0]} of {sum(halves)} requests of {trace} for {found['hardware']['name']} over "
        f"{found['hardware']['link']}, budget {picked['budget']} slots.\n"
        f"#\n# Trial {picked['trial']} of {found['search']['trials']}, objectives {', '.join(found['objectives'])}, "
        f"seed {found['search']['seed']}; tune.json has the front, and how it does on the other requests.\n"
        f"# {found['command']}\n"
    )
    document = comment + yaml.safe_dump(policy.document, sort_keys=False)
    write_whole(out / "policy.yaml", document.encode())
    write_whole(out / "tune.json", (json.dumps(found, indent=2) + "\n").encode())


def _print(found: Values) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    from .compare_command import print_comparison

    table = Table(box=SIMPLE_HEAD, pad_edge=False, title_justify="left", title_style="bold")
    of = found["search"]
    table.title = f"front of {of['trials']} trials ({of['impossible']} more could not be), on the requests tuned on"
    for heading in ("trial", "ms/token", "GiB", "link MB/token", "exact"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("policy")
    for row in found["front"]:
        chosen = "* " if row["trial"] == found["picked"]["trial"] else ""
        table.add_row(
            f"{chosen}{row['trial']}", f"{row['time'] * 1e3:,.2f}", f"{row['memory'] / 2**30:.2f}",
            f"{row['link'] / 1e6:,.1f}", row["exactness"], _parts(row["document"]),
        )  # fmt: skip
    Console(soft_wrap=False).print(table)
    print("* picked. On the requests not tuned on, with as many slots:")
    print_comparison(found["judged"])


def _parts(document: dict[str, dict[str, Any]]) -> str:
    cache, prefetch = document["cache"], document["prefetch"]
    words = [cache["evict"], cache["scope"]]
    words += [cache["split"]] if cache["split"] != "uniform" else []
    words += [f"prefetch {prefetch['kind']}"] if prefetch["kind"] != "none" else []
    words += [document["miss"]["kind"]] if document["miss"]["kind"] != "wait" else []
    return ", ".join(words)
