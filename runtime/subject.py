"""The model that a measurement is about: a checkpoint, or one of a known size with random weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import InputError
from ..policies.policy import Policy
from ..traces.bundled import TINY_MOE
from ..traces.models import list_model_specs, load_model_spec
from ..traces.recorder import spec_of
from ..traces.trace import Trace
from .backend import DeviceBackend, available_ram
from .bare_model import checkpoint_folder, skeleton_of
from .disk_tier import DiskTier
from .forced_routing import check_geometry
from .offload import Offload, experts_of, served_layers
from .random_model import random_model


@dataclass(frozen=True)
class Subject:
    """The model that is measured: loaded, with experts in host memory, or read from `folder` with `ram` for experts."""

    model: Any  # None with ram
    backend: DeviceBackend
    folder: Path | None = None
    ram: str | None = None

    @contextmanager
    def under(self, policy: Policy, budget: Any) -> Iterator[Offload]:
        """The model offloaded under a policy."""
        if self.model is None:
            assert self.folder is not None
            offload = Offload.of_checkpoint(self.folder, policy, budget, ram=self.ram, backend=self.backend)
            try:
                yield offload
            finally:
                if isinstance(offload.source, DiskTier):  # nothing is given back: the model is dropped
                    offload.source.close()
            return
        offload = Offload.of_model(self.model, policy, budget, backend=self.backend)
        try:
            yield offload
        finally:
            offload.detach()

    @contextmanager
    def resident(self) -> Iterator[Any]:
        """The model as transformers runs it, every expert on the device; None where that is too small."""
        device = self.backend.device
        if self.model is None or not self._fits():
            yield None
            return
        layers = served_layers(self.model)
        for layer in layers:
            experts_of(layer).to(device)
        try:
            yield self.model
        finally:
            if device.type != "cpu":
                for layer in layers:
                    experts_of(layer).to("cpu")

    def _fits(self) -> bool:
        size = sum(weight.nbytes for weight in expert_parameters(self.model))
        return self.backend.device.type == "cpu" or self.backend.free_bytes() > size


def load_subject(name: str, shrink: int, ram: str | None, backend: DeviceBackend, trace: Trace) -> tuple[Subject, str]:
    """What is measured, and its name: a bundled spec with random weights, or a checkpoint's folder or hub id.

    Raises InputError, before anything large is loaded, for a model that `trace` cannot be the routing of.
    """
    known = name in list_model_specs() and not Path(name).is_dir()
    if known and ram is not None:
        raise InputError("--ram reads experts from their checkpoint: give a checkpoint's folder or id, not a spec")
    if not known and shrink != 1:
        raise InputError("--shrink makes a random model of a bundled spec smaller; a checkpoint is as large as it is")
    if known:
        check_geometry(trace, load_model_spec(name), name)
        model, shown = random_model(name, shrink), name if shrink == 1 else f"{name} / {shrink}"
    else:
        folder = checkpoint_folder(name)
        shown, skeleton = name_of(folder), skeleton_of(folder)
        served_layers(skeleton)
        check_geometry(trace, spec_of(skeleton), shown)
        if ram is not None:
            return Subject(None, backend, folder, ram), shown
        model = whole_model(folder, skeleton)
    place_dense(model, backend.device)
    return Subject(model, backend), shown


def whole_model(folder: Path, skeleton: Any) -> Any:
    """A checkpoint's model with its experts in host memory. Raises InputError where it does not fit."""
    size, free = sum(weight.nbytes for weight in skeleton.parameters()), available_ram()
    if size > free:
        raise InputError(
            f"{folder}: takes {size / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB of host memory are free: give --ram, "
            "which leaves experts on disk"
        )
    return type(skeleton).from_pretrained(folder).eval()


def name_of(folder: Path) -> str:
    """What a checkpoint is called."""
    return "tiny-moe" if folder == TINY_MOE else folder.resolve().name


@torch.no_grad()
def place_dense(model: Any, device: torch.device) -> None:
    """Move everything but the experts to where it is computed with."""
    experts = {id(weight) for weight in expert_parameters(model)}
    for parameter in model.parameters():
        if id(parameter) not in experts:
            parameter.data = parameter.data.to(device)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)


def expert_parameters(model: Any) -> list[nn.Parameter]:
    """Of every MoE layer."""
    return [weight for layer in served_layers(model) for weight in experts_of(layer).parameters(recurse=False)]
