"""The figure of `sim mrc`: misses over slots, a line per policy."""

from __future__ import annotations

from io import BytesIO
from itertools import cycle

import numpy as np

from .miss_ratio import MissCurve
from .summary_plot import BLUE, GREEN, GREY, ORANGE, RED

SLOTS = {"layer": "slots per layer", "global": "slots in one pool"}


def curve_png(curves: dict[str, MissCurve], title: str) -> bytes:
    """PNG bytes, the same for the same curves. Raises ValueError for curves of different scopes or sizes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    first = next(iter(curves.values()))
    if any((curve.scope, curve.misses.shape) != (first.scope, first.misses.shape) for curve in curves.values()):
        raise ValueError("curves of different scopes or sizes do not share an axis")
    figure = Figure(figsize=(7.5, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    slots = np.arange(first.misses.shape[1])
    looks = zip(cycle((BLUE, ORANGE, GREEN, RED, GREY)), cycle(("-", "--", "-.", ":")), strict=False)
    for (name, curve), (colour, line) in zip(curves.items(), looks, strict=False):
        axes.plot(slots[1:], curve.ratio[1:] * 100, color=colour, linestyle=line, label=name, linewidth=1.8)
    axes.set_xlabel(f"{SLOTS[first.scope]} (of {slots[-1]})")
    axes.set_ylabel("needed experts that miss (%)")
    axes.set_xlim(0, slots[-1])
    axes.set_ylim(0, 100)
    share = axes.secondary_xaxis("top", functions=(lambda n: n / slots[-1] * 100, lambda p: p * slots[-1] / 100))
    share.set_xlabel("share of the experts that fit (%)")
    axes.grid(color="#DDDDDD", linewidth=0.6)
    axes.spines["right"].set_visible(False)
    axes.legend(frameon=False)
    figure.suptitle(title, fontsize=11)
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=130, metadata={"Software": None})
    return buffer.getvalue()
