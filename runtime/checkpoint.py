"""Where each expert's weights lie in a safetensors checkpoint, whatever names and shapes it was saved under.

transformers knows how a family's checkpoints map to its parameters (renamings, and operations such as merging one
tensor per expert); the same operations are applied here to one expert at a time. Most checkpoints only merge: then an
expert is a few ranges of bytes, which can be read straight into its row.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    Interleave,
    MergeModulelist,
    Transpose,
    WeightConverter,
    dot_natural_key,
    rename_source_key,
)

from ..errors import InputError
from .layout import Field, RowLayout

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
PER_EXPERT = (MergeModulelist, Concatenate, Interleave, Transpose)  # operations that leave experts apart


@dataclass(frozen=True)
class Piece:
    """A range of bytes of a file that holds one expert's part of one saved tensor."""

    file: Path
    first: int
    size: int
    dtype: torch.dtype
    shape: tuple[int, ...]  # of the part

    def part(self, index: int) -> Piece:
        """Entry `index` of the first dimension."""
        shape, size = self.shape[1:], self.size // self.shape[0]
        return Piece(self.file, self.first + index * size, size, self.dtype, shape)


@dataclass(frozen=True)
class Saved:
    """One field of one expert: the pieces under each source pattern, and what is to be done with them."""

    pieces: tuple[tuple[str, Piece], ...]
    converter: Any  # None: as saved
    name: str  # the parameter's full name
    stacked: bool  # pieces are entries of tensors over all experts

    def is_row(self, field: Field) -> bool:
        """The pieces' bytes, one after the other, are the field's bytes."""
        operations = [] if self.converter is None else self.converter.operations
        merging = all(type(one) in (MergeModulelist, Concatenate) and one.dim in (0, 1) for one in operations)
        return merging and all(piece.dtype == field.dtype for _, piece in self.pieces)

    def convert(self, parts: Sequence[Tensor], field: Field) -> Tensor:
        """The field of the pieces' contents, in the field's number format."""
        if self.converter is None:
            return parts[0].to(field.dtype)
        held: Any = {}
        for (pattern, _), part in zip(self.pieces, parts, strict=True):
            held.setdefault(pattern, []).append(part[None] if self.stacked else part)
        patterns = {
            "source_patterns": self.converter.source_patterns,
            "target_patterns": self.converter.target_patterns,
        }
        for operation in self.converter.operations:
            held = operation.convert(
                held,
                **patterns,
                full_layer_name=self.name,
                model=_OneExpert(field.shape),
                config=None,
                missing_keys=None,
            )
        made = next(iter(held.values()))
        return (made[0] if isinstance(made, list) else made).reshape(field.shape).to(field.dtype)


class _OneExpert:
    """Tells an operation that compares shapes what one expert's parameter looks like."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._parameter = torch.empty(1, *shape, device="meta")

    def get_parameter(self, name: str) -> Tensor:
        return self._parameter


class Checkpoint:
    """The experts of a checkpoint folder: `saved[layer][expert][field name]`."""

    def __init__(self, folder: Path, model: Any, modules: Sequence[str], experts: int, layout: RowLayout) -> None:
        """`model` on meta with all its parameters; `modules` are the paths of its experts modules, by MoE layer.

        Raises InputError for a missing or unreadable file, a number format that cannot be moved, or missing experts.
        """
        self.folder, self.layout, self.experts = folder, layout, experts
        found = _by_parameter(model, saved_tensors(folder))
        self.saved: list[list[dict[str, Saved]]] = []
        for path in modules:
            fields = {field.name: self._field(found, f"{path}.{field.name}") for field in layout.fields}
            self.saved.append([{name: of[expert] for name, of in fields.items()} for expert in range(experts)])

    @property
    def rows_as_saved(self) -> bool:
        """Every expert's row can be read as it is, without converting anything."""
        first = (self.saved[0][0], self.saved[-1][-1])
        return all(saved[field.name].is_row(field) for saved in first for field in self.layout.fields)

    def pieces(self, key: int) -> list[tuple[int, Piece]]:
        """(place in the row, piece) of expert `key` = layer * experts + expert. Only for `rows_as_saved`."""
        layer, expert = divmod(key, self.experts)
        placed = []
        for field in self.layout.fields:
            at = field.first
            for _, piece in self.saved[layer][expert][field.name].pieces:
                placed.append((at, piece))
                at += piece.size
        return placed

    def _field(self, found: Mapping[str, tuple[Any, dict[str, list[Piece]]]], name: str) -> list[Saved]:
        """The field of each expert."""
        if name not in found:
            raise InputError(f"{self.folder}: no weights for {name}; give a complete checkpoint of this model")
        converter, patterns = found[name]
        if converter is not None and any(type(one) not in PER_EXPERT for one in converter.operations):
            raise InputError(f"{self.folder}: {name} is saved in a form that cannot be read expert by expert")
        counts = {len(pieces) for pieces in patterns.values()}
        stacked = counts == {1}
        if not stacked and counts != {self.experts}:
            raise InputError(f"{self.folder}: {name} has {sorted(counts)} saved tensors for {self.experts} experts")
        ordered = [(pattern, patterns[pattern]) for pattern in _in_order(converter, patterns)]
        if stacked and any(pieces[0].shape[0] != self.experts for _, pieces in ordered):
            raise InputError(f"{self.folder}: {name} is not saved over {self.experts} experts")
        made = []
        for expert in range(self.experts):
            parts = ((p, pieces[0].part(expert) if stacked else pieces[expert]) for p, pieces in ordered)
            made.append(Saved(tuple(parts), converter, name, stacked))
        return made


def saved_tensors(folder: Path) -> dict[str, Piece]:
    """Every tensor of a checkpoint folder, by name, from the headers of its safetensors files. Raises InputError."""
    index = folder / "model.safetensors.index.json"
    names = sorted(set(_json(index)["weight_map"].values())) if index.is_file() else ["model.safetensors"]
    found: dict[str, Piece] = {}
    for name in names:
        file = folder / name
        try:
            with file.open("rb") as stream:
                length = int.from_bytes(stream.read(8), "little")
                header = json.loads(stream.read(length))
        except (OSError, ValueError, MemoryError, OverflowError) as error:
            raise InputError(
                f"{file}: cannot be read as safetensors ({error}); offloading reads nothing else"
            ) from None
        for key, about in header.items():
            if key == "__metadata__":
                continue
            first, last = about["data_offsets"]
            dtype = DTYPES.get(about["dtype"], about["dtype"])
            piece = Piece(file, 8 + length + first, last - first, dtype, tuple(about["shape"]))
            if file.stat().st_size < piece.first + piece.size:
                raise InputError(f"{file}: ends before tensor {key}; download it again")
            found[key] = piece
    return found


def _by_parameter(model: Any, tensors: Mapping[str, Piece]) -> dict[str, tuple[Any, dict[str, list[Piece]]]]:
    """Parameter -> (converter, pieces by source pattern), as transformers itself matches them."""
    mapping = get_model_conversion_mapping(model)
    converters = [one for one in mapping if isinstance(one, WeightConverter)]
    renamings = [one for one in mapping if not isinstance(one, WeightConverter)]
    by_pattern = {pattern: one for one in converters for pattern in one.source_patterns}
    parameters, prefix = model.state_dict(), model.base_model_prefix
    found: dict[str, tuple[Any, dict[str, list[Piece]]]] = {}
    for key in sorted(tensors, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, parameters)
        if name not in parameters and key in parameters:
            name, pattern = key, None
        converter = None if pattern is None else by_pattern[pattern]
        place = found.setdefault(name, (converter, {}))
        place[1].setdefault(pattern or "", []).append(tensors[key])
    for name, (_, patterns) in found.items():
        for piece in (piece for pieces in patterns.values() for piece in pieces):
            if not isinstance(piece.dtype, torch.dtype) and ".experts." in name:
                raise InputError(
                    f"{piece.file}: experts saved as {piece.dtype} cannot be offloaded yet; "
                    "give a checkpoint in bfloat16, float16 or float32"
                )
    return found


def _in_order(converter: Any, patterns: Mapping[str, Any]) -> list[str]:
    return list(patterns) if converter is None else [one for one in converter.source_patterns if one in patterns]


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({error}); download it again") from None
