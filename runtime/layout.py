"""How one expert's weights lie in a row of bytes: the same row in a file, in host memory and in a device slot."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from ..errors import InputError

ROW_ALIGN = 512  # bytes: what Ascend asks of a copy's ends; a cache line and a DMA burst divide it
FIELD_ALIGN = 64  # of each matrix in a row: vector loads and grouped kernels ask for 16
# In the order in which an expert computes with them
WEIGHTS = ("gate_up_proj", "gate_up_proj_bias", "up_proj", "up_proj_bias", "down_proj", "down_proj_bias")
FORMATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Field:
    """One matrix or bias of an expert."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    first: int  # byte in the row
    size: int  # bytes

    @property
    def end(self) -> int:
        return self.first + self.size


@dataclass(frozen=True)
class RowLayout:
    """The fields of a row, and its length in bytes."""

    fields: tuple[Field, ...]
    size: int

    def __getitem__(self, name: str) -> Field:
        return next(field for field in self.fields if field.name == name)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(field.name for field in self.fields)

    def view(self, rows: Tensor, name: str) -> Tensor:
        """`name` of every row: a view [n, *shape] of rows [n, size] uint8."""
        field = self[name]
        return rows[:, field.first : field.end].view(field.dtype).unflatten(-1, field.shape)


def expert_weights(module: nn.Module) -> dict[str, Tensor]:
    """The parameters [E, ...] of an experts module that move with an expert, by name, in row order."""
    own = dict(module.named_parameters(recurse=False))
    return {name: own[name] for name in WEIGHTS if name in own}


def row_layout(weights: Mapping[str, Tensor], family: str) -> RowLayout:
    """The row of one expert of parameters [E, ...]. Raises InputError for a number format that cannot be moved."""
    fields, first = [], 0
    for name, weight in weights.items():
        if weight.dtype not in FORMATS:
            raise InputError(
                f"model family {family}: experts in {str(weight.dtype).removeprefix('torch.')} cannot be offloaded "
                "yet; load a checkpoint in bfloat16, float16 or float32"
            )
        shape = tuple(weight.shape[1:])
        size = prod(shape) * weight.dtype.itemsize
        fields.append(Field(name, shape, weight.dtype, first, size))
        first = _up(first + size, FIELD_ALIGN)
    return RowLayout(tuple(fields), _up(first, ROW_ALIGN))


def _up(size: int, step: int) -> int:
    return -(-size // step) * step
