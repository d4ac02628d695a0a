"""Regenerate the measured parts of README.md: data, training, loss curve, perplexity, routing.

    python -m moeflow.traces.tiny_moe.card --evaluate WORK                  # perplexities -> evaluation.json
    python -m moeflow.traces.tiny_moe.card --routing TRACE ORIGINAL.npz     # routing table -> routing.md
    python -m moeflow.traces.tiny_moe.card                                  # tables and loss_curve.png only

Each part stands between `<!-- NAME -->` and `<!-- /NAME -->` and comes from a file in this folder, so a run without
options needs neither the corpus nor torch.
"""

import argparse
import csv
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from . import routing_statistics

HERE = Path(__file__).parent
KINDS = ("prose", "dialogue", "docs", "code")
LENGTH = 512  # tokens per window, as in training


def markdown(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def evaluate(work: Path) -> None:
    """Held-out perplexity of the exported model and of a unigram baseline, by kind; writes `evaluation.json`."""
    import torch
    from transformers import AutoModelForCausalLM

    from . import model as tiny

    model = AutoModelForCausalLM.from_pretrained(HERE, dtype=torch.float32, experts_implementation="grouped_mm")
    train, heldout = tiny.load_ids(work, "train"), tiny.load_ids(work, "heldout")
    counts = 1 + np.bincount(np.concatenate(list(train.values())), minlength=model.config.vocab_size)
    surprise = -np.log(counts / counts.sum())  # nats per token id, add-one over the train split
    result: dict[str, dict[str, Any]] = {
        "train_tokens": {kind: len(ids) for kind, ids in train.items()},
        "heldout": {},
    }
    for kind, ids in heldout.items():
        windows = tiny.heldout_windows(ids, LENGTH)
        scored = windows[:, 1:].numpy()
        result["heldout"][kind] = {
            "tokens": scored.size,
            "loss": tiny.mean_loss(model, windows),
            "unigram_loss": float(surprise[scored].mean()),
        }
    (HERE / "evaluation.json").write_text(json.dumps(result, indent=1) + "\n")


def perplexity() -> str:
    """Perplexity per token by kind, model against unigram."""
    path = HERE / "evaluation.json"
    if not path.exists():
        return "Not evaluated yet."
    heldout: dict[str, dict[str, float]] = json.loads(path.read_text())["heldout"]
    total = sum(row["tokens"] for row in heldout.values())
    heldout["all"] = {"tokens": total} | {
        name: sum(row["tokens"] * row[name] for row in heldout.values()) / total for name in ("loss", "unigram_loss")
    }
    rows = [
        [kind, f"{row['tokens']:,}", f"{math.exp(row['loss']):.1f}", f"{math.exp(row['unigram_loss']):.1f}"]
        for kind, row in heldout.items()
    ]
    return markdown(["held-out text", "tokens", "perplexity", "unigram perplexity"], rows)


def data() -> str:
    """The sources with their licences and sizes; the packages of one game are one row."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for source in json.loads((HERE / "sources.json").read_text()):
        package = re.sub(r"(wesnoth-[\d.]+-)\w+", r"\1*", source["package"])
        groups.setdefault((source["kind"], package, source["version"], source["licence"]), []).append(source)
        groups.setdefault((f"**{source['kind']}**", "", "", ""), []).append(source)
    rows = []
    for key, members in sorted(groups.items(), key=lambda item: (KINDS.index(item[0][0].strip("*")), item[0][1] == "")):
        count, train, heldout = (
            sum(s[name] for s in members) for name in ("documents", "train_bytes", "heldout_bytes")
        )
        rows.append(
            [key[0], f"`{key[1]}`" if key[1] else "", *key[2:], count, f"{train / 1e6:.2f}", f"{heldout / 1e3:.0f}"]
        )
    header = ["kind", "Debian package", "version", "licence of the text", "documents", "train, MB", "held out, kB"]
    return markdown(header, rows)


def curve() -> list[dict[str, float]]:
    """The rows of `loss_curve.csv`; empty cells become NaN."""
    with (HERE / "loss_curve.csv").open() as file:
        return [{name: float(cell or "nan") for name, cell in row.items()} for row in csv.DictReader(file)]


def training() -> str:
    """How long and how far the model was trained."""
    last = curve()[-1]
    rows = [
        ["steps", f"{last['step']:,.0f}"],
        ["tokens", f"{last['tokens']:,.0f}"],
        ["time", f"{last['seconds'] / 60:.0f} min"],
        ["speed", f"{last['tokens'] / last['seconds']:,.0f} tokens/s"],
        ["last training loss, nats", f"{last['loss']:.3f}"],
        ["last balance loss (1 = even), mean over layers", f"{last['balance']:.3f}"],
    ]
    return markdown(["", ""], rows)


def plot() -> None:
    """Draw training and held-out loss over tokens into `loss_curve.png`."""
    from matplotlib.figure import Figure

    rows = curve()
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.plot([row["tokens"] / 1e6 for row in rows], [row["loss"] for row in rows], color="0.6", lw=1, label="training")
    scored = [row for row in rows if not math.isnan(row["heldout_prose"])]
    for kind in KINDS:
        axes.plot(
            [row["tokens"] / 1e6 for row in scored],
            [row[f"heldout_{kind}"] for row in scored],
            marker=".",
            lw=1.2,
            label=f"held-out {kind}",
        )
    axes.set(xlabel="training tokens, millions", ylabel="cross-entropy, nats per token")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(HERE / "loss_curve.png", dpi=110, metadata={"Software": None})


def main() -> None:
    """Measure what was asked for, then rewrite every part of the card."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--evaluate", metavar="WORK", type=Path, help="measure perplexity on WORK's held-out text")
    parser.add_argument("--routing", metavar="TRACE", type=Path, nargs="+", help="traces to compare")
    args = parser.parse_args()
    if args.evaluate:
        evaluate(args.evaluate)
    routing = HERE / "routing.md"
    if args.routing:
        routing.write_text(routing_statistics.table(args.routing) + "\n")
    parts = {
        "data": data(),
        "training": training(),
        "perplexity": perplexity(),
        "routing": routing.read_text().strip() if routing.exists() else "Not measured yet.",
    }
    plot()
    card = (HERE / "README.md").read_text()
    for name, text in parts.items():
        begin, end = f"<!-- {name} -->\n", f"\n<!-- /{name} -->"
        if card.count(begin) != 1 or card.count(end) != 1:
            parser.error(f"README.md: expected one part {name}")
        card = card[: card.index(begin)] + begin + text + card[card.index(end) :]
    (HERE / "README.md").write_text(card)


if __name__ == "__main__":
    main()
