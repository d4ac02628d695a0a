"""NVTX ranges around every pass and MoE layer of an offloaded model, for `nsys` and other profilers.

Push and pop, not start and end: nsys attributes kernels to the former alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..errors import UnsupportedHardwareError
from .offload import Offload


def check_nvtx() -> None:
    """Raises UnsupportedHardwareError where torch has no NVTX."""
    if not torch.cuda.is_available():
        raise UnsupportedHardwareError("--nvtx: NVTX ranges need torch with CUDA and an NVIDIA GPU; leave the flag out")


@contextmanager
def nvtx_ranges(offload: Offload) -> Iterator[None]:
    """Within the block: `pass`, in it `moe layer N`, and in that `experts`, once it is decided what to copy."""
    push, pop = torch.cuda.nvtx.range_push, torch.cuda.nvtx.range_pop
    compute = offload.live.compute

    def ranged(layer: int, module: Any, implementation: Callable[..., Any], *rest: Any) -> Any:
        def experts(*given: Any) -> Any:
            push("experts")
            try:
                return implementation(*given)
            finally:
                pop()

        push(f"moe layer {layer}")
        try:
            return compute(layer, module, experts, *rest)
        finally:
            pop()

    offload.live.__dict__["compute"] = ranged
    handles = [
        offload.model.register_forward_pre_hook(lambda *_: void(push("pass")), prepend=True),
        offload.model.register_forward_hook(lambda *_: void(pop()), always_call=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        del offload.live.__dict__["compute"]


def void(_: Any) -> None:
    """A hook's result would replace what the model returns."""
