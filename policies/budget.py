"""How many experts fit: `--budget` as slots, the same number in simulator and runtime."""

from __future__ import annotations

import math
import re
from decimal import Decimal

from ..errors import InputError
from ..traces.model_spec import ModelSpec
from .residency import Slots

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
UNITS |= {f"{unit}i": 1024**power for power, unit in enumerate("KMGT", 1)}


def parse_bytes(text: str, option: str) -> int:
    """`20GiB`, `20GB`, `512MiB` as bytes. Raises InputError naming `option`."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]i?|)B\s*", text, re.IGNORECASE)
    if not match:
        raise InputError(f"{option} {text!r}: expected a size such as 20GiB or 800MB")
    unit = match[2].upper().replace("I", "i")
    return int(Decimal(match[1]) * UNITS[unit])


def slots_for_budget(
    budget: str | float | int, model: ModelSpec, scope: str, scratch: int, expert_bytes: int | None = None
) -> Slots:
    """Slots for a budget given as bytes (`20GiB`), slots (`512`) or a fraction of all routed experts (`0.25`).

    `expert_bytes`: what one slot takes, where that is not the model's own figure.

    A fraction f is floor(f * E) slots in every layer (global scope: floor(f * L * E) in the pool) with scratch on
    top; bytes and slots include scratch. Raises InputError below scratch plus one slot per scope.
    """
    layers, text = len(model.moe_layers), str(budget).strip()
    size = model.bytes_per_expert if expert_bytes is None else expert_bytes
    scopes = layers if scope == "layer" else 1
    if re.fullmatch(r"\d+", text) or re.fullmatch(r"\d+ ?slots?", text):
        total = int(text.removesuffix("s").removesuffix("slot"))
        held, given = total - scratch, f"{total} slots"
    elif re.fullmatch(r"\d*\.\d*|\d+(\.\d+)?e-?\d+", text):
        fraction = float(text)
        if not 0 < fraction <= 1:
            raise InputError(f"--budget {text}: a fraction lies between 0 and 1; give slots as a whole number")
        # 1e-9: 0.28 of 100 experts is 28, whatever binary fractions say
        held = math.floor(fraction * model.experts * (layers if scopes == 1 else 1) + 1e-9) * scopes
        given = f"a fraction of {text}"
    else:
        held = parse_bytes(text, "--budget") // size - scratch
        given = text
    if held < scopes:
        least = scratch + scopes
        raise InputError(
            f"--budget {budget}: {given} is too little: the least is {least} slots "
            f"({least * size / 2**20:,.1f} MiB of {model.name}): {scratch} scratch plus one for "
            f"{'each of ' + str(layers) + ' layers' if scopes > 1 else 'the pool'}"
        )
    return Slots(_shares(held, scopes, layers * model.experts // scopes), scratch)


def _shares(held: int, scopes: int, most: int) -> tuple[int, ...]:
    """An equal split, the remainder to the first scopes; no scope gets more than it has experts."""
    each, extra = divmod(held, scopes)
    return tuple(min(most, each + (scope < extra)) for scope in range(scopes))
