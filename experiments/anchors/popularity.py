"""How much of a request's needs do the most popular experts cover? Measured on recordings of real models.

    python experiments/anchors/popularity.py [--traces ../shared/traces]

writes popularity.json: for each recording and share of a layer's experts, `frequency`, the coverage of the experts
that the other requests used most, and `dynamic`, of those that the first half of the same request used most, over its
second half. Decode tokens only: recordings of real models hold no prompts.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

OUT = Path(__file__).with_name("popularity.json")
RECORDINGS = ("dsv2lite_nvmoe", "gptoss20b_mmlu_val_dev", "olmoe_nvmoe", "qwen3_30b_a3b_sparsify")
SHARES = (0.1, 0.3, 0.5, 0.7)
ABSENT = 255


def uses(ids: NDArray[np.uint8], experts: int) -> NDArray[np.int64]:
    """[L, E]: how often each expert was chosen in ids [T, L, K]."""
    counted = [
        np.bincount(layer[layer != ABSENT], minlength=experts) for layer in ids.swapaxes(0, 1).reshape(ids.shape[1], -1)
    ]
    return np.stack(counted).astype(np.int64)


def covered(by: NDArray[np.int64], needs: NDArray[np.int64], share: float) -> float:
    """Needs [L, E] that fall on the `share` of each layer's experts ranked first by `by`, a part of one counted so."""
    ranked = np.take_along_axis(needs, np.argsort(-by, axis=1, kind="stable"), 1)
    reached = np.concatenate((np.zeros((len(needs), 1)), np.cumsum(ranked, axis=1)), axis=1).sum(0)
    return float(np.interp(share * needs.shape[1], np.arange(needs.shape[1] + 1), reached))


def measure(ids: NDArray[np.uint8], sequence: NDArray[np.int32], experts: int) -> dict[str, dict[str, float]]:
    """Coverage by kind and share, over all requests of two tokens and more."""
    requests = [ids[sequence == number] for number in np.unique(sequence)]
    requests = [request for request in requests if len(request) > 1]
    used = [uses(request, experts) for request in requests]
    halves = [(uses(r[: len(r) // 2], experts), uses(r[len(r) // 2 :], experts)) for r in requests]
    pairs = {"frequency": [(sum(used) - own, own) for own in used], "dynamic": halves}
    return {
        kind: {
            f"{share:g}": round(
                sum(covered(by, needs, share) for by, needs in of) / sum(int(needs.sum()) for _, needs in of), 4
            )
            for share in SHARES
        }
        for kind, of in pairs.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=Path, default=Path("../shared/traces"))
    folder = parser.parse_args().traces
    if not folder.is_dir():
        raise SystemExit(f"{folder}: no such folder; name the one with the recordings by --traces")
    found = {}
    for name in RECORDINGS:
        facts = json.loads((folder / f"{name}_decode.json").read_text(encoding="utf-8"))
        with np.load(folder / f"{name}_decode.npz") as arrays:
            experts = int(facts["num_experts"])
            found[name] = {
                "licence": facts["license"],
                "requests": len(np.unique(arrays["seq_id"])),
                "tokens": len(arrays["seq_id"]),
                **measure(arrays["expert_ids"], arrays["seq_id"], experts),
            }
    part = OUT.with_suffix(".part")
    part.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    part.replace(OUT)


if __name__ == "__main__":
    main()
