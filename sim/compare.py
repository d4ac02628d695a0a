"""Two runs of one trace, paired request by request: differences with intervals, so that luck is not called progress."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError

FIGURES = {"tpot_s": "time per token", "ttft_s": "first token", "wait_s": "exposed wait"}
CONFIDENCE = 0.95
RESAMPLES = 9999
SEED = 0  # of the bootstrap: the same runs give the same interval

Values = dict[str, Any]


def load_result(path: str | Path) -> Values:
    """`result.json`, or the folder of a run that holds one. Raises InputError."""
    file = Path(path) / "result.json" if Path(path).is_dir() else Path(path)
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(
            f"{file}: no such file; name a folder that `sim run --out` wrote, or its result.json"
        ) from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "no JSON"
        raise InputError(f"{file}: cannot be read ({reason}); name a result.json of `sim run`") from None
    if not isinstance(values, dict) or not {"trace", "policy", "hardware"} <= values.keys():
        raise InputError(f"{file}: is no result of `sim run`; name its result.json")
    if "per_request" not in values:
        raise InputError(f"{file}: has no figures per request (an older moeflow wrote it); run it again")
    return values


def compare(first: Values, second: Values, names: tuple[str, str] = ("A", "B")) -> Values:
    """The second run less the first, per request present in both: `result.json` values in, plain values out.

    For each figure: requests, both means, the mean difference and the ratio of means, each with its 95 % bootstrap
    interval over requests (Efron 1987, BCa), and the p-value of Wilcoxon's signed-rank test (1945). Intervals are None
    for a single request or where all requests differ alike. Raises InputError for runs of different traces.
    """
    traces = [values["trace"] for values in (first, second)]
    if traces[0]["sha256"] != traces[1]["sha256"]:
        shown = " and ".join(f"{trace['name']} ({trace['sha256'][:12]})" for trace in traces)
        raise InputError(
            f"{names[0]} and {names[1]}: runs of different traces, {shown}; requests pair up only within one trace "
            "in the same batches"
        )
    pairs = {figure: _paired(first["per_request"], second["per_request"], figure) for figure in FIGURES}
    return {
        "trace": traces[0],
        "runs": {name: _label(values) for name, values in zip(names, (first, second), strict=True)},
        "confidence": CONFIDENCE,
        "figures": {figure: _compared(*pair) for figure, pair in pairs.items() if len(pair[0])},
    }


def _label(values: Values) -> Values:
    hardware, policy = values["hardware"], values["policy"]
    return {
        "policy": policy["name"],
        "hardware": hardware["name"],
        "link": hardware["link"],
        "budget_bytes": values["budget_bytes"],
        "exactness": values["exactness"],
        "oracle": policy["oracle"],
        "calibrated": values["calibrated"],
    }


def _paired(first: Values, second: Values, figure: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The figure in both runs, [n] each, for the requests that have it in both."""
    known = [
        {request: value for request, value in zip(run["request"], run[figure], strict=True) if value is not None}
        for run in (first, second)
    ]
    common = sorted(known[0].keys() & known[1].keys())
    a, b = (np.array([run[request] for request in common], np.float64) for run in known)
    return a, b


def _compared(a: NDArray[np.float64], b: NDArray[np.float64]) -> Values:
    return {
        "requests": len(a),
        "mean": [float(a.mean()), float(b.mean())],
        "difference": _with_interval(a, b, lambda a, b, axis: b.mean(axis=axis) - a.mean(axis=axis)),
        "ratio": _with_interval(a, b, lambda a, b, axis: b.mean(axis=axis) / a.mean(axis=axis)) if a.any() else None,
        "p": _signed_rank(b - a),
    }


def _with_interval(a: NDArray[np.float64], b: NDArray[np.float64], statistic: Any) -> Values:
    """The statistic and its interval. A resample holds whole pairs."""
    value = float(statistic(a, b, axis=0))
    alike = len(a) < 2 or np.ptp(b - a) == 0
    return {"value": value, "interval": None if alike else _interval(a, b, statistic)}


def _interval(a: NDArray[np.float64], b: NDArray[np.float64], statistic: Any) -> list[float] | None:
    from scipy.stats import bootstrap

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a degenerate resample: its interval is not finite
        found = bootstrap(
            (a, b), statistic, paired=True, vectorized=True, n_resamples=RESAMPLES, batch=1000,
            confidence_level=CONFIDENCE, method="BCa", random_state=np.random.default_rng(SEED),
        )  # fmt: skip
    low, high = map(float, found.confidence_interval)
    return [low, high] if np.isfinite([low, high]).all() else None


def _signed_rank(difference: NDArray[np.float64]) -> float:
    """Two-sided p; 1 where no request differs."""
    from scipy.stats import wilcoxon

    return float(wilcoxon(difference).pvalue) if difference.any() else 1.0
