"""Wait for the copy: every missing expert is fetched and computed on the device. Exact."""

from __future__ import annotations

from .miss_service import MissService


class Wait(MissService):
    """The default: nothing but `MissService`'s own behaviour."""
