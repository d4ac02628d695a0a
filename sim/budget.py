"""How many experts fit a modelled device: `--vram` as slots."""

from __future__ import annotations

from ..errors import InputError
from ..hwprofiles.profile import Hardware
from ..policies.budget import parse_bytes, slots_for_budget
from ..policies.residency import Slots
from ..traces.model_spec import ModelSpec

__all__ = ["parse_bytes", "slots_for_budget", "slots_for_memory"]


def slots_for_memory(
    memory: int, model: ModelSpec, hardware: Hardware, scope: str, scratch: int, context: int,
    held: tuple[int, int] | None = None,
) -> Slots:  # fmt: skip
    """Slots in what a device of `memory` bytes has left after dense weights, workspace and KV for `context` tokens.

    `held`: bytes of dense weights and of KV per token on a device that has a part of the model; None: all of them.
    """
    dense, kv = held or (model.dense_bytes, model.kv_bytes_per_token)
    fixed = hardware.device.reserve_bytes + dense + context * kv
    left = memory - fixed
    if left < 0:
        raise InputError(
            f"--vram {memory / 2**30:.2f}GiB: {model.name} needs {fixed / 2**30:.2f} GiB before any expert "
            f"(dense weights {dense / 2**30:.2f}, workspace {hardware.device.reserve_bytes / 2**30:.2f}, "
            f"KV cache for {context} tokens {context * kv / 2**30:.2f}): choose a larger device "
            "or a smaller --max-context"
        )
    return slots_for_budget(f"{left}B", model, scope, scratch)
