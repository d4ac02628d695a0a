"""One figure that says where a run's time went and what the cache did."""

from __future__ import annotations

from io import BytesIO
from typing import Any

import numpy as np

from .result import Result

# Okabe and Ito's palette: distinguishable with every common form of colour blindness.
BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#8C8C8C"


def summary_png(result: Result) -> bytes:
    """PNG bytes, the same for the same result: time per token, its distribution, and hits by layer."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7.2), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 2, height_ratios=(1, 1.25))
    _where_time_went(figure.add_subplot(grid[0, :]), result)
    _durations(figure.add_subplot(grid[1, 0]), result)
    _layers(figure.add_subplot(grid[1, 1]), result)
    values = result.values
    calibrated = "calibrated" if values["calibrated"] else "uncalibrated"
    figure.suptitle(
        f"{values['model']['name']} on {values['hardware']['name']} over {values['hardware']['link']} ({calibrated}), "
        f"policy {values['policy']['name']}, budget {values['budget']}",
        fontsize=11,
    )
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=130, metadata={"Software": None})
    return buffer.getvalue()


def _where_time_went(axes: Any, result: Result) -> None:
    values, bounds = result.values, result.values["bounds"]
    share, mean = values["time_share"], values["tpot_s"]["mean"] * 1e3
    parts = (("compute", BLUE), ("overhead", GREY), ("wait", RED))
    names = {"compute": "device computes", "overhead": "host, launches, syncs", "wait": "exposed wait for experts"}
    left = 0.0
    for part, colour in parts:
        width = share[part] * mean
        axes.barh(2, width, left=left, color=colour, label=names[part], height=0.62)
        if width > 0.05 * mean:
            axes.text(left + width / 2, 2, f"{width:.3g}", ha="center", va="center", color="white", fontsize=9)
        left += width
    rows = (("clairvoyant bound", GREEN, 1), ("all resident bound", ORANGE, 0)) if bounds else ()
    for (_, colour, y), name in zip(rows, ("clairvoyant", "resident"), strict=False):
        width = bounds[name]["tpot_s"] * 1e3
        axes.barh(y, width, color=colour, height=0.62)
        axes.text(width + 0.006 * mean, y, f"{width:.3g} ({mean / width:.2f}x below this run)", va="center", fontsize=9)
    axes.text(left + 0.006 * mean, 2, f"{mean:.3g}", va="center", fontsize=9)
    axes.set_yticks([2, *(y for _, _, y in rows)], ["this run", *(label for label, _, _ in rows)])
    axes.set_xlim(0, mean * 1.3)
    axes.set_xlabel("mean time per output token (ms)" if result.steps.decode.any() else "mean time per step (ms)")
    _legend_above(axes)
    _plain(axes)


def _durations(axes: Any, result: Result) -> None:
    counted = result.steps.decode if result.steps.decode.any() else ~result.steps.decode
    if result.values["batching"]["kind"] == "continuous":
        counted = np.ones(len(result.steps), np.bool_)
    steps = result.measurements.steps
    duration = np.sort((steps["end_ps"] - steps["start_ps"])[counted]) / 1e9
    share = np.arange(1, len(duration) + 1) / len(duration) * 100
    axes.plot(duration, share, color=BLUE, label="this run")
    if result.values["bounds"]:
        axes.plot(np.sort(result.resident_ps[counted]) / 1e9, share, color=ORANGE, label="all resident bound")
    axes.set_xlabel("duration of a step (ms)")
    axes.set_ylabel("steps that took at most this (%)")
    axes.set_xlim(left=0)
    axes.set_ylim(0, 101)
    _legend_above(axes)
    _plain(axes)


def _layers(axes: Any, result: Result) -> None:
    layers = result.values["layers"]
    index = np.arange(len(layers["hit"]))
    bottom = np.zeros(len(index))
    for name, colour in (("hit", BLUE), ("late", ORANGE), ("miss", RED)):
        height = np.array(layers[name]) * 100
        axes.bar(index, height, bottom=bottom, color=colour, label=name, width=0.85)
        bottom += height
    axes.set_xlabel("MoE layer")
    axes.set_ylabel("needed experts (%), all steps")
    axes.set_ylim(0, 100)
    axes.set_xlim(-0.6, len(index) - 0.4)
    _legend_above(axes)
    _plain(axes)


def _legend_above(axes: Any) -> None:
    """Outside the axes, where it cannot cover what it explains."""
    axes.legend(ncols=3, frameon=False, fontsize=9, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2)


def _plain(axes: Any) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
