"""What a layer's router and gates said, brought to the host in one copy: the layer's one wait of the host."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def on_host(told: dict[str, Tensor]) -> dict[str, NDArray[Any]]:
    """Ids as int64, everything else as float16, in the shapes given."""
    if all(one.device.type == "cpu" for one in told.values()):
        return {name: one.detach().to(_kind(one)).numpy() for name, one in told.items()}
    return unpacked(packed(told).cpu().numpy(), told)


def packed(told: dict[str, Tensor]) -> Tensor:
    """[n] int32: all of it behind each other."""
    return torch.cat([_words(one).reshape(-1) for one in told.values()]) if told else torch.zeros(0, dtype=torch.int32)


def unpacked(words: NDArray[np.int32], told: dict[str, Tensor]) -> dict[str, NDArray[Any]]:
    """The inverse of `packed`; of `told` only shapes and dtypes are read."""
    found, first = {}, 0
    for name, one in told.items():
        part = words[first : first + one.numel()].reshape(tuple(one.shape))
        found[name] = part.view(np.float32).astype(np.float16) if one.is_floating_point() else part.astype(np.int64)
        first += one.numel()
    return found


def _kind(one: Tensor) -> torch.dtype:
    return torch.float16 if one.is_floating_point() else torch.int64


def _words(one: Tensor) -> Tensor:
    """As int32; floats rounded to half precision first, as a trace has them."""
    if one.is_floating_point():
        return one.detach().half().float().contiguous().view(torch.int32)
    return one.to(torch.int32)
