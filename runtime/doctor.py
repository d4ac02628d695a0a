"""What this machine can do with offloaded models, and what is missing: each finding a sentence with what to do."""

from __future__ import annotations

import os
import platform
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

PINNED = 64 << 20  # bytes of the attempt to pin. Chosen here


@dataclass(frozen=True)
class Finding:
    """`fine`: whether it is as it should be; None where that does not matter here. `do`: what would change it."""

    name: str
    fine: bool | None
    says: str
    do: str = ""
    facts: dict[str, Any] | None = None


def examine() -> tuple[bool, list[Finding]]:
    """(whether any model can run, everything found)."""
    libraries = [_library("torch"), _library("transformers")]
    found = [
        Finding("python", True, f"Python {platform.python_version()} on {platform.machine()} {platform.system()}.")
    ]
    found += libraries
    able = all(one.fine for one in libraries)
    checks: list[Callable[[], Finding]] = [_memory, _device, _pinned, _direct_reads, _families] if able else []
    for check in [*checks, _numba, _profile]:
        found.append(check())
    return able, found


def _library(name: str) -> Finding:
    """Whether a library is there, imports, and has a version that moeflow was made for."""
    from packaging.requirements import Requirement

    lines = requires("moeflow") or []
    wanted = next(r for r in map(Requirement, lines) if r.name == name and "live" in str(r.marker))
    try:
        has = version(name)
        __import__(name)
    except PackageNotFoundError:
        return Finding(name, False, f"{name} is not installed.", "pip install 'moeflow[live]'")
    except Exception as error:  # whatever a broken installation raises
        first = (str(error).splitlines() or ["?"])[0]
        return Finding(
            name, False, f"{name} {has} cannot be imported ({type(error).__name__}: {first}).", "Install it again."
        )
    if not wanted.specifier.contains(has, prereleases=True):
        do = f"pip install '{name}{wanted.specifier}'"
        return Finding(name, False, f"{name} {has} is not supported: moeflow is made for {wanted.specifier}.", do)
    return Finding(
        name, True, f"{name} {has} is supported.", facts={"version": has, "supported": str(wanted.specifier)}
    )


def _device() -> Finding:
    import torch

    from ..traces.record_command import device_name
    from .backend import HostBackend
    from .devices import backend_for, default_device

    device = default_device()
    if device.type == "cpu":
        return Finding(
            "device", None, "No accelerator that torch can use: experts move from disk or host memory to slots there.",
            "For an accelerator install the torch built for it.", {"type": "cpu", "threads": torch.get_num_threads()},
        )  # fmt: skip
    backend = backend_for(device)
    assert not isinstance(backend, HostBackend)
    free, name = backend.free_bytes(), device_name(device)
    tested = "" if device.type == "cuda" else " It is served by its documented interface and has not been tested here."
    facts = {"type": device.type, "name": name, "free_bytes": free}
    return Finding("device", True, f"{name}, {free / 2**30:.1f} GiB free.{tested}", facts=facts)


def _memory() -> Finding:
    from ..errors import InputError
    from .backend import available_ram

    try:
        free = available_ram()
    except InputError as error:
        return Finding("memory", None, "This system does not say how much host memory is free.", str(error))
    says = f"{free / 2**30:.1f} GiB of host memory are free; with --ram what does not fit is read from disk."
    return Finding("memory", True, says, facts={"free_bytes": free})


def _pinned() -> Finding:
    from ..errors import InputError
    from .devices import backend_for, default_device

    device = default_device()
    if device.type == "cpu":
        return Finding("pinned memory", None, "Nothing has to be pinned: copies stay within host memory.")
    backend = backend_for(device)
    try:
        rows = backend.host_rows(1, PINNED)
        backend.pin(rows)
        backend.unpin(rows)
    except InputError as error:
        return Finding("pinned memory", False, "Host memory cannot be pinned.", str(error))
    return Finding("pinned memory", True, f"{PINNED >> 20} MiB of host memory could be pinned.")


def _direct_reads() -> Finding:
    """Of the folder into which the hub's models are downloaded, else the current one."""
    import warnings

    import torch
    from huggingface_hub.constants import HF_HUB_CACHE

    from .reader import BLOCK, Reader

    folder = Path(HF_HUB_CACHE) if Path(HF_HUB_CACHE).is_dir() else Path.cwd()
    facts = {"folder": str(folder)}
    reader = Reader()
    try:
        with tempfile.NamedTemporaryFile(dir=folder) as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            file.write(os.urandom(2 * BLOCK))
            file.flush()
            os.fsync(file.fileno())
            reader.read(Path(file.name), 0, torch.empty(2 * BLOCK, dtype=torch.uint8))
    except OSError as error:
        return Finding("direct reads", None, f"Nothing can be tried in {folder} ({error.strerror}).", facts=facts)
    finally:
        reader.close()
    if reader.direct:
        return Finding("direct reads", True, f"Files in {folder} can be read past the page cache.", facts=facts)
    says = f"The file system of {folder} refuses direct reads, so experts on disk would pass through the page cache."
    return Finding("direct reads", False, says, "Keep checkpoints that --ram leaves on disk elsewhere.", facts)


def _families() -> Finding:
    from .families import known_families

    served, refused = known_families()
    says = f"{len(served)} model families are served, {len(refused)} refused."
    return Finding("families", True, says, facts={"served": served, "refused": refused})


def _numba() -> Finding:
    if find_spec("numba") is None:
        says = "numba is not installed: decisions are the same and take several times as long."
        return Finding("numba", False, says, "pip install numba")
    return Finding("numba", True, f"numba {version('numba')} compiles what decides.")


def _profile() -> Finding:
    """A hardware profile that was measured: a bundled one, or a YAML file in the current folder."""
    measured = list(_measured_profiles())
    if measured:
        says = f"Measured hardware profiles: {', '.join(measured)}."
        return Finding("profile", True, says, facts={"calibrated": measured})
    return Finding(
        "profile", False, "No hardware profile was measured on a machine like this, so simulations are uncalibrated.",
        "Measure one into this folder: sim hw calibrate --out mybox.yaml", {"calibrated": []},
    )  # fmt: skip


def _measured_profiles() -> Iterator[str]:
    from ..errors import InputError
    from ..hwprofiles.profile import list_profiles, load_hardware

    files = [str(path) for path in sorted(Path.cwd().glob("*.yaml"))]
    for name in [*list_profiles()["machine"], *files]:
        try:
            if load_hardware(name).calibrated:
                yield Path(name).name
        except InputError:
            continue  # of another kind: a policy, a link
