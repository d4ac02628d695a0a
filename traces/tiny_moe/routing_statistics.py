"""Compare the routing of recorded traces: how evenly experts are used, how much is reused, what a cache would hit.

    python -m moeflow.traces.tiny_moe.routing_statistics TRACE [TRACE ...]

TRACE is a moeflow trace or an `.npz` with `expert_ids`, `seq_id`, `phase` (0 prefill, 1 decode) and 255 for absent.
Only decode rows count, sequence after sequence; every trace is cut to the length of the shortest. Prints markdown.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

SHUFFLES = 5  # permutations averaged for the finite-sample baseline of mutual information


@dataclass(frozen=True)
class Decode:
    """Decode rows of one trace: chosen experts [N, L, K] (-1 = absent), sequence of each row [N], expert count."""

    name: str
    ids: NDArray[np.int64]
    sequence: NDArray[np.int64]
    experts: int

    def first(self, rows: int) -> "Decode":
        """The first rows only."""
        return Decode(self.name, self.ids[:rows], self.sequence[:rows], self.experts)

    def used(self, layer: int) -> NDArray[np.bool_]:
        """[N, E]: which experts each row used in a layer."""
        table = np.zeros((len(self.ids), self.experts + 1), dtype=bool)
        np.put_along_axis(table, self.ids[:, layer], True, axis=1)  # -1 goes to the last column
        return table[:, :-1]


def load(path: Path) -> Decode:
    """Read the decode rows of either format, ordered by sequence, then time."""
    if path.suffix == ".npz":
        with np.load(path) as arrays:
            ids, sequence, phase = arrays["expert_ids"], arrays["seq_id"], arrays["phase"]
    else:
        from ..reader import load_trace

        trace = load_trace(path)
        ids, sequence, phase = trace.experts, trace.request, trace.phase
    absent = np.iinfo(ids.dtype).max
    rows = np.flatnonzero(phase == 1)
    rows = rows[np.argsort(sequence[rows], kind="stable")]
    chosen = np.where(ids[rows] == absent, -1, ids[rows].astype(np.int64))
    # The expert count is not in the .npz; every count in use is a power of two.
    experts = 1 << int(chosen.max()).bit_length()
    return Decode(path.name.split(".")[0], chosen, sequence[rows].astype(np.int64), experts)


def use_entropy(trace: Decode) -> float:
    """Entropy of the experts' shares of all choices, over log E; mean over layers (1 = all used equally)."""
    values = []
    for layer in range(trace.ids.shape[1]):
        share = trace.used(layer).sum(0) / trace.used(layer).sum()
        share = share[share > 0]
        values.append(-(share * np.log(share)).sum() / np.log(trace.experts))
    return float(np.mean(values))


def reuse(trace: Decode) -> float:
    """Mean share of a token's experts that the token before it, in its sequence and layer, also used."""
    same = np.flatnonzero(trace.sequence[1:] == trace.sequence[:-1]) + 1
    shared = chosen = 0
    for layer in range(trace.ids.shape[1]):
        used = trace.used(layer)
        shared += (used[same] & used[same - 1]).sum()
        chosen += used[same].sum()
    return float(shared / chosen)


def lru_hit_rate(trace: Decode, fraction: float) -> float:
    """Share of needed experts that an LRU cache of floor(fraction * E) experts per layer holds.

    Event-atomic: all of a token's experts are looked up at once against the state before the token, then touched. The
    cache starts cold and is kept across sequences; among equally old experts the lowest id is evicted first.
    """
    capacity = int(fraction * trace.experts)
    hits = needed = 0
    for layer in range(trace.ids.shape[1]):
        touched = np.full(trace.experts, -1)  # row of the last use; -1 = not held
        for row, chosen in enumerate(trace.ids[:, layer]):
            ids = np.unique(chosen[chosen >= 0])
            hits += int((touched[ids] >= 0).sum())
            needed += len(ids)
            touched[ids] = row
            held = np.flatnonzero(touched >= 0)
            excess = len(held) - capacity
            if excess > 0:
                touched[held[np.argsort(touched[held], kind="stable")[:excess]]] = -1
    return hits / needed


def mutual_information(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> float:
    """Plug-in mutual information in bits between two experts' use indicators, mean over all E x E pairs."""
    rows = len(first)
    a, b = first.astype(float), second.astype(float)
    both = a.T @ b / rows
    p, q = a.mean(0)[:, None], b.mean(0)[None, :]
    cells = ((both, p * q), (p - both, p * (1 - q)), (q - both, (1 - p) * q), (1 - p - q + both, (1 - p) * (1 - q)))
    total = np.zeros_like(both)
    for joint, independent in cells:
        joint = np.where(joint > 1e-12, joint, 0.0)  # rounding can leave a tiny negative probability
        total += joint * np.log2(np.divide(joint, independent, out=np.ones_like(joint), where=joint > 0))
    return float(total.mean())


def adjacent_information(trace: Decode) -> tuple[float, float]:
    """Mean mutual information between adjacent layers, and the same with one layer's rows shuffled."""
    random = np.random.default_rng(0)
    real, shuffled = [], []
    for layer in range(trace.ids.shape[1] - 1):
        first, second = trace.used(layer), trace.used(layer + 1)
        real.append(mutual_information(first, second))
        shuffled += [mutual_information(first, random.permutation(second)) for _ in range(SHUFFLES)]
    return float(np.mean(real)), float(np.mean(shuffled))


def table(paths: list[Path]) -> str:
    """One markdown column per trace, all cut to the same number of decode rows."""
    traces = [load(path) for path in paths]
    rows = min(len(trace.ids) for trace in traces)
    traces = [trace.first(rows) for trace in traces]
    information = [adjacent_information(trace) for trace in traces]
    lines = {
        "decode tokens": [f"{rows:,}"] * len(traces),
        "sequences": [str(len(np.unique(trace.sequence))) for trace in traces],
        "layers / experts / k": [f"{t.ids.shape[1]} / {t.experts} / {t.ids.shape[2]}" for t in traces],
        "entropy of expert use / log E": [f"{use_entropy(trace):.3f}" for trace in traces],
        "next-token reuse": [f"{reuse(trace):.3f}" for trace in traces],
        "reuse expected at random (k / E)": [f"{t.ids.shape[2] / t.experts:.3f}" for t in traces],
        "LRU hit rate, 25 % of experts": [f"{lru_hit_rate(trace, 0.25):.3f}" for trace in traces],
        "LRU hit rate, 50 % of experts": [f"{lru_hit_rate(trace, 0.5):.3f}" for trace in traces],
        "adjacent-layer information, millibits per expert pair": [f"{1000 * real:.2f}" for real, _ in information],
        "the same, rows shuffled": [f"{1000 * shuffled:.2f}" for _, shuffled in information],
    }
    out = ["| | " + " | ".join(f"`{trace.name}`" for trace in traces) + " |", "|---" * (len(traces) + 1) + "|"]
    return "\n".join(out + [f"| {name} | " + " | ".join(values) + " |" for name, values in lines.items()])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("traces", metavar="TRACE", type=Path, nargs="+")
    print(table(parser.parse_args().traces))


if __name__ == "__main__":
    main()
