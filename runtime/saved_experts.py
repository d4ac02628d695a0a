"""Rows of experts out of a checkpoint."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .checkpoint import Checkpoint, Piece
from .layout import RowLayout
from .reader import Reader


class SavedExperts:
    """Reads expert `key` of a checkpoint into a row. Safe for threads."""

    def __init__(self, checkpoint: Checkpoint, reader: Reader) -> None:
        self.checkpoint, self.reader = checkpoint, reader
        self.layout: RowLayout = checkpoint.layout
        self._plain = checkpoint.rows_as_saved

    def read(self, key: int, row: Tensor) -> None:
        """Fill `row` [size] uint8. Raises OSError naming the file that cannot be read."""
        if self._plain:
            for at, piece in self.checkpoint.pieces(key):
                self.reader.read(piece.file, piece.first, row[at : at + piece.size])
            return
        layer, expert = divmod(key, self.checkpoint.experts)
        for field in self.layout.fields:
            saved = self.checkpoint.saved[layer][expert][field.name]
            made = saved.convert([self._whole(piece) for _, piece in saved.pieces], field)
            self.layout.view(row[None], field.name)[0].copy_(made)

    def statistics(self) -> dict[str, Any]:
        """Bytes read so far, and whether past the page cache."""
        return {"bytes_read": self.reader.bytes_read, "direct": self.reader.direct}

    def close(self) -> None:
        self.reader.close()

    def _whole(self, piece: Piece) -> Tensor:
        held = torch.empty(piece.size, dtype=torch.uint8)
        self.reader.read(piece.file, piece.first, held)
        return held.view(piece.dtype).reshape(piece.shape)
