"""Replay published figures with the simulator and say how far off it is.

    python experiments/anchors/report.py [--only NAME ...] [--check]

Prints the report and writes it to README.md beside this file; the same inputs give the same bytes. --only prints
parts of it and writes nothing. --check writes nothing either, and fails if README.md is not what would be written.
Numbers within the prose are computed too; its other words are true of the present table: reread them when it moves.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))  # also when it is not the script itself that runs

import imp_ablation
import ktransformers
import llama
from figures import Anchor, Figure, load_anchors
from replays import Predicted, machine

OUT = Path(__file__).with_name("README.md")
Replay = Callable[[Anchor], dict[str, Predicted]]
Why = Callable[[Anchor, Mapping[str, Predicted]], str]


@dataclass(frozen=True)
class Part:
    """One table: an anchor's figures, how they are replayed, and what is said of the errors."""

    anchor: str
    heading: str
    replay: Replay
    why: Why


PARTS = {
    "ktransformers": Part("ktransformers", "", ktransformers.replay, ktransformers.why),
    "ktransformers-layers": Part(
        "ktransformers", ", if layers are split over the cards", ktransformers.replay_layers, ktransformers.why_layers
    ),
    "llama-x16": Part("llama-x16", "", llama.replay_x16, llama.why_x16),
    "llama-x4": Part("llama-x4", "", llama.replay_x4, llama.why_x4),
    "llama-ncmoe": Part("llama-ncmoe", "", llama.replay_ncmoe, llama.why_ncmoe),
    "llama-elsewhere": Part("llama-elsewhere", "", llama.replay_elsewhere, llama.why_elsewhere),
    "imp": Part("imp", ", with the bundled profile's cost per launch", imp_ablation.replay, imp_ablation.why),
    "imp-told": Part(
        "imp", ", with its own measured cost per launch and copy", imp_ablation.replay_told, imp_ablation.why_told
    ),
}
AGAIN = ("ktransformers-layers", "imp-told")  # the same figures under another assumption


@dataclass(frozen=True)
class Row:
    part: str
    figure: Figure
    predicted: Predicted

    @property
    def error(self) -> float | None:
        return None if self.predicted.value is None else self.figure.error(self.predicted.value)

    @property
    def right_side(self) -> bool | None:
        """Of a ratio: do both say gain, or both loss? None where there is no prediction."""
        return None if self.predicted.value is None else self.figure.same_side(self.predicted.value)


def rows_of(name: str, anchors: Mapping[str, Anchor]) -> list[Row]:
    """Every figure of a part with its prediction; ratios are of two predictions."""
    part = PARTS[name]
    anchor = anchors[part.anchor]
    predicted = part.replay(anchor)
    missing = [key for key, figure in anchor.figures.items() if not figure.ratio and key not in predicted]
    if missing:
        raise ValueError(f"{name}: no prediction and no reason for {', '.join(missing)}")
    rows = []
    for key, figure in anchor.figures.items():
        rows.append(Row(name, figure, _quotient(figure, predicted) if figure.ratio else predicted[key]))
    return rows


def _quotient(figure: Figure, predicted: Mapping[str, Predicted]) -> Predicted:
    assert figure.ratio is not None
    above, below = (predicted[name] for name in figure.ratio)
    if above.value is None or below.value is None:
        return Predicted.none(above.why_not or below.why_not)
    interval = None
    if above.interval and not below.interval:
        interval = (above.interval[0] / below.value, above.interval[1] / below.value)
    return Predicted(above.value / below.value, interval)


def table(rows: list[Row]) -> list[str]:
    lines = ["| figure | published | predicted | interval | inside | error |", "|---|---|---|---|---|---|"]
    for row in rows:
        figure, predicted = row.figure, row.predicted
        unit = "" if figure.unit == "tok/s" else f" {figure.unit}"
        if predicted.value is None:
            cells = [figure.what, f"{figure}{unit}", f"cannot be replayed: {predicted.why_not}", "", "", ""]
        else:
            inside = _inside(row)
            error = f"{row.error:+.0%}"
            if figure.ratio and not row.right_side:
                error += ", **wrong side of 1**"
            shown = _shown(figure, predicted.value)
            interval = "" if predicted.interval is None else " to ".join(_shown(figure, x) for x in predicted.interval)
            cells = [figure.what, f"{figure}{unit}", f"{shown}{unit}", interval, inside, error]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _inside(row: Row) -> str:
    interval = row.predicted.interval
    if interval is None:
        return ""
    return "yes" if row.figure.inside(interval) else "**no**"


def _shown(figure: Figure, value: float) -> str:
    return f"{value:.2f}" if figure.ratio or figure.unit == "x" else f"{value:.1f}"


def section(name: str, anchors: Mapping[str, Anchor], rows: list[Row]) -> list[str]:
    part = PARTS[name]
    anchor = anchors[part.anchor]
    facts = anchor.facts
    assumed = "; ".join(facts["rests_on"])
    about = (
        f"{facts['model']}. {facts['hardware']}. {facts['settings']}. [{facts['source'].removeprefix('https://')}]"
        f"({facts['source']}), {facts['date']}" + (f"; also {facts['also']}" if "also" in facts else "") + "."
    )
    return [
        f"## {facts['title']}{part.heading}", "", *paragraphs(about),
        *(paragraphs(f"Assumed, since it is not stated: {assumed}.") if assumed else []),
        *table(rows), "", *paragraphs(part.why(anchor, {row.figure.name: row.predicted for row in rows})),
    ]  # fmt: skip


def summary(rows: list[Row]) -> list[str]:
    """Counts over what could be replayed; figures that were replayed twice count as they were replayed first."""
    once = [row for row in rows if row.part not in AGAIN]
    rates = [row for row in once if not row.figure.ratio and row.error is not None and row.figure.unit == "tok/s"]
    errors = np.array([row.error for row in rates])
    ratios = [row for row in once if row.figure.ratio and row.error is not None]
    sides = sum(bool(row.right_side) for row in ratios)
    given = [row for row in once if row.predicted.interval is not None and not row.figure.ratio]
    inside = sum(row.figure.inside(row.predicted.interval) for row in given if row.predicted.interval)
    without = [row for row in once if row.predicted.value is None]
    worst = max(rates, key=lambda row: abs(row.error or 0.0))
    prose = [
        f"Of {len(once)} figures {len(once) - len(without)} were replayed. Over {len(rates)} rates the median error is "
        f"{np.median(errors):+.0%}, the median size of an error {np.median(np.abs(errors)):.0%}, the worst "
        f"{worst.error:+.0%} ({worst.figure.what}). {int((np.abs(errors) <= 0.1).sum())} are within 10 %, "
        f"{int((np.abs(errors) <= 0.25).sum())} within 25 %.",
        f"Of {len(ratios)} ratios {sides} are predicted on the right side of 1, gain as gain and loss as loss. "
        f"{inside} of {len(given)} intervals reach the published figure; they span localities and recordings, not the "
        "hardware's numbers.",
    ]
    lines = [
        *paragraphs("\n\n".join(prose)),
        "| table | rates | median error | within 25 % | ratios on the right side |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for name in PARTS:
        its = [row.error for row in rows if row.part == name and not row.figure.ratio and row.error is not None
               and row.figure.unit == "tok/s"]  # fmt: skip
        if not its:
            continue
        quotients = [row.right_side for row in rows if row.part == name and row.figure.ratio]
        near = sum(abs(error) <= 0.25 for error in its)
        lines.append(
            f"| {name} | {len(its)} | {np.median(its):+.0%} | {near} of {len(its)} | {sum(map(bool, quotients))} of "
            f"{len(quotients)} |"
        )
    return lines


def paragraphs(text: str) -> list[str]:
    """Prose, each paragraph filled anew: numbers in it vary in length."""
    lines = []
    for paragraph in text.split("\n\n"):
        lines += [*textwrap.wrap(paragraph, 118, break_long_words=False, break_on_hyphens=False), ""]
    return lines


NUMBERS = {
    "device.memory_bandwidth": "device memory, B/s", "device.memory_bytes": "device memory, B",
    "device.memory_achieved": "share reached", "device.op_latency_s": "device time per kernel, s",
    "host.memory_bandwidth": "host memory, B/s", "host.cpu_flops": "host cores, FLOP/s",
    "host.issue_s": "per launch, s", "host.graph_issue_s": "per graph segment, s", "host.sync_s": "read-back, s",
    "host.policy_s": "decision per layer, s", "host.sample_s": "sampling, s", "link.h2d.bandwidth": "link, B/s",
    "link.h2d.pageable_bandwidth": "link, pageable, B/s", "link.h2d.alpha_s": "copy on an idle link, s",
    "link.submit_s": "submitting a copy, s", "link.submit_batched_s": "a further copy, s",
}  # fmt: skip


def hardware_table() -> list[str]:
    """Every number of the machines that these figures depend on, with its kind; equal ones share a line."""
    names = dict.fromkeys((*ktransformers.MACHINES, *llama.MACHINES, *imp_ablation.MACHINES))
    where: dict[tuple[str, str, str], list[str]] = {}
    for path, what in NUMBERS.items():
        for name in names:
            hardware = machine(name)
            value: Any = hardware
            for part in path.split("."):
                value = getattr(value, part)
            kind, _, source = hardware.sources[path].partition(": ")
            marked = f"**assumed** ({kind}): {source}" if kind == "estimate" else f"{kind}: {source}"
            where.setdefault((what, f"{value:g}", marked), []).append(name)
    lines = ["| number | value | kind: source | machines |", "|---|---|---|---|"]
    for (what, shown, source), its in where.items():
        machines = "all" if len(its) == len(names) else ", ".join(its)
        lines.append(f"| {what} | {shown} | {source} | {machines} |")
    return lines


INTRODUCTION = """\
# Published anchors, replayed

    python experiments/anchors/report.py

writes this page: what others measured on their machines, replayed with moeflow's simulator on profiles of those
machines. No number was fitted to a published rate. The last table says of each number that matters whether it is a data
sheet's, measured, derived or assumed. Routing is surrogate ([plan.md](../../docs/plan.md)), since nobody published a
recording with a rate. The published figures, their sources and what they leave open are in
[published.yaml](published.yaml).

*error* is predicted over published, less one; of a published range, its nearer end. *interval* is over three localities
(caches) or four recordings (popular experts), *inside* says whether it reaches the published figure.
"""


def report(anchors: Mapping[str, Anchor], names: tuple[str, ...] = tuple(PARTS)) -> str:
    """The page, or the sections named."""
    rows = {name: rows_of(name, anchors) for name in names}
    sections = [line for name in names for line in section(name, anchors, rows[name])]
    if names != tuple(PARTS):
        return "\n".join(sections)
    everything = [row for its in rows.values() for row in its]
    lines = [INTRODUCTION, *summary(everything), "", *sections, "## The machines' numbers", "", *hardware_table()]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=tuple(PARTS), metavar="NAME", help=", ".join(PARTS))
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    text = report(load_anchors(), tuple(options.only or PARTS))
    if options.check:
        if OUT.read_text(encoding="utf-8") != text:
            raise SystemExit(f"{OUT}: not what this tree writes; run python experiments/anchors/report.py")
        return
    print(text, end="")
    if not options.only:
        part = OUT.with_suffix(".part")
        part.write_text(text, encoding="utf-8")
        part.replace(OUT)


if __name__ == "__main__":
    main()
