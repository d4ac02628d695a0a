"""Measure this machine and write its hardware profile: `sim hw calibrate`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError, UnsupportedHardwareError
from ..hwprofiles.profile import load_hardware
from .calibrate_compute import compute
from .calibrate_host import host, policy_time
from .calibrate_link import link
from .calibrate_load import BUSY, Others
from .calibrate_number import Number, Numbers
from .calibrate_profile import Files, documents, doubtful, measured_on, refuse_to_mix, write
from .calibrate_sampling import sampling
from .calibrate_storage import storage
from .calibrate_subject import Subject
from .calibrate_timing import Effort
from .devices import default_device

MINUTES = Effort()


def calibrate(
    out: Path, device: str | None = None, disk: Path | None = None, effort: Effort = MINUTES,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:  # fmt: skip
    """Measure and write `out` with its link and storage beside it; returns the documents by kind.

    `device`: as torch names it; default: the accelerator, else the CPU. `disk`: a folder on the disk that experts will
    be read from; default: where `out` is. `say` is told what is being measured. Raises InputError, before anything is
    measured, for files that another device's calibration or no calibration wrote; UnsupportedHardwareError for a device
    that this machine has not.
    """
    chosen, files = chosen_device(device), Files.beside(out)
    folder = disk or out.parent
    if not folder.is_dir():
        raise InputError(f"--disk {folder}: is no folder; name one on the disk that holds the model")
    here = measured_on(chosen)
    refuse_to_mix(files, here)
    say(f"device: {here['device']}; host: {here['host']}")
    others = Others()
    subject = Subject(chosen, effort)
    numbers = measure(subject, say)
    say("disk: reads by block size and number")
    read = storage(folder, effort)
    numbers |= read.numbers
    others_took = others.share()
    if others_took > BUSY:
        say(f"other programs took {others_took:.0%} of the cores: nothing is calibrated; stop them and measure again")
    for path, scatter in doubtful(numbers).items():
        say(f"{path} scatters by {scatter:.0%}: not calibrated; stop what else runs here and measure again")
    if not read.direct:
        say(f"{folder}: no direct reads there, the page cache may have answered: the storage is not calibrated")
    made = documents(numbers, files, here, subject.asynchronous, subject.unified(), read.direct, others_took <= BUSY)
    write(made, files)
    load_hardware(out)
    return made


@torch.inference_mode()
def measure(subject: Subject, say: Callable[[str], None]) -> Numbers:
    """All but the disk; the subject's buffers are gone afterwards."""
    numbers: Numbers = {}
    parts: tuple[tuple[str, Callable[[Subject], Numbers]], ...] = (
        ("link: copies by size and direction", link),
        ("device: products, grouped experts, launches", compute),
        ("host: experts on its cores, alone and beside copies", host),
        ("host: policy and sampling", lambda one: policy_time(one.effort) | sampling(one)),
    )
    for what, part in parts:
        say(what)
        numbers |= part(subject)
    subject.release()
    total, taken = subject.memory()
    return numbers | {
        "device.memory_bytes": Number(total, "all memory, as the driver or system reports it"),
        "device.reserve_bytes": Number(taken, "taken by contexts, workspaces and other programs meanwhile"),
    }


def chosen_device(name: str | None) -> torch.device:
    """Raises InputError for a name that is none, UnsupportedHardwareError for a device that is not here."""
    if name is None:
        return default_device()
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(
            f"--device {name}: no device of torch; give cpu, or an accelerator as torch names it"
        ) from None
    if device.type == "cpu":
        return device
    have = default_device()
    count = torch.accelerator.device_count() if have.type == device.type else 0
    if (device.index or 0) >= count:
        raise UnsupportedHardwareError(
            f"--device {name}: torch finds no such device here; leave --device out for {have.type}"
        )
    return device
