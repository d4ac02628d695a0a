"""What was measured, as three profile documents, and the refusal to mix one device's numbers with another's."""

from __future__ import annotations

import datetime
import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml

from ..errors import InputError
from .calibrate_number import Number, Numbers

UNITS = {
    "flops": "FLOP/s", "cpu_flops": "FLOP/s", "memory_bandwidth": "B/s", "bandwidth": "B/s", "read_bandwidth": "B/s",
    "pageable_bandwidth": "B/s", "memory_bytes": "B", "reserve_bytes": "B", "block_bytes": "B", "queue_depth": "1",
    "duplex": "1", "flops_achieved": "1", "memory_achieved": "1",
}  # fmt: skip # all others are seconds
WHOLE = ("memory_bytes", "reserve_bytes", "block_bytes", "queue_depth")
DRIVERS = (Path("/proc/driver/nvidia/version"), Path("/usr/local/Ascend/driver/version.info"))
TRUSTED = 0.25  # scatter from which on a number does not count as calibrated. Chosen here
SLIGHT_S = 1e-6  # scatter of a time that no prediction feels. Chosen here
HEADER = "# Measured by `sim hw calibrate`, which writes it again; docs/hardware.md says what each number means.\n"
Values = dict[str, Any]


@dataclass(frozen=True)
class Files:
    """The documents that belong together; the machine names the others."""

    machine: Path
    link: Path
    storage: Path

    @classmethod
    def beside(cls, out: Path) -> Files:
        """`mybox.yaml`, `mybox-link.yaml`, `mybox-storage.yaml`. Raises InputError for a name no profile can have."""
        if out.suffix not in (".yaml", ".yml") or not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", out.stem):
            raise InputError(
                f"--out {out}: name a .yaml file, in letters, digits, dots, dashes and underscores: mybox.yaml"
            )
        if not out.parent.is_dir():
            raise InputError(f"--out {out}: there is no folder {out.parent}; make it first")
        return cls(out, *(out.with_name(f"{out.stem}-{part}{out.suffix}") for part in ("link", "storage")))

    def of(self) -> dict[str, Path]:
        return {"machine": self.machine, "link": self.link, "storage": self.storage}


def measured_on(device: torch.device) -> Values:
    """What the numbers belong to: device, host, software, date. The first two tell one box from another."""
    if device.type == "cpu":
        name = "the host's own cores and memory, no accelerator"
    else:
        name = str(torch.get_device_module(device).get_device_name(device))
    software = [
        f"torch {torch.__version__} on {torch.get_num_threads()} threads", f"transformers {transformers.__version__}",
        _driver(), f"Python {platform.python_version()}", platform.platform(),
    ]  # fmt: skip
    return {
        "device": name,
        "host": f"{_processor()}, {os.cpu_count()} cores",
        "software": ", ".join(part for part in software if part),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),  # noqa: UP017
    }


def refuse_to_mix(files: Files, here: Values) -> None:
    """Raise InputError for a file that is there already and is not an earlier calibration of the same box."""
    for path in files.of().values():
        if not path.exists():
            continue
        try:
            there = yaml.safe_load(path.read_text(encoding="utf-8"))["measured_on"]
            named = {key: str(there[key]) for key in ("device", "host")}
        except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError):
            raise InputError(f"{path}: is there and no calibration wrote it; choose another --out") from None
        for key, its in named.items():
            if its != here[key]:
                raise InputError(
                    f"{path}: was measured on another {key} ({its}, here {here[key]}); numbers of two boxes are not "
                    "mixed: choose another --out"
                )


def kind_of(path: str) -> str:
    """The document that a number belongs to."""
    first = path.partition(".")[0]
    return first if first in ("link", "storage") else "machine"


def doubtful(numbers: Numbers) -> dict[str, float]:
    """Scatter by path, of the numbers that scatter too much for their document to count as calibrated."""
    scattering = {path: number for path, number in numbers.items() if number.scatter > TRUSTED}
    return {path: number.scatter for path, number in scattering.items() if not _slight(path, number)}


def _slight(path: str, number: Number) -> bool:
    """Seconds that do not matter, however they scatter."""
    return path.endswith("_s") and number.value * number.scatter < SLIGHT_S


def documents(
    numbers: Numbers, files: Files, here: Values, asynchronous: bool, unified: bool, direct: bool, quiet: bool
) -> Values:
    """The documents by kind. `direct`: the storage's numbers are the disk's own. `quiet`: nothing else was running."""
    stem, on = files.machine.stem, here["device"]
    on_cpu = not asynchronous
    what = {
        "machine": f"{here['host']}: no accelerator, the device is this CPU and slots are RAM" if on_cpu else f"{on}",
        "link": f"memcpy within RAM, {here['host']}" if on_cpu else f"between host memory and {on}",
        "storage": "disk of the measured machine" + ("" if direct else ", not measured: no direct reads there"),
    }
    names = {"machine": f"{stem}-on-cpu" if on_cpu else stem, "link": f"{stem}-memcpy" if on_cpu else f"{stem}-link"}
    made: Values = {}
    uncalibrated = {kind_of(path) for path in doubtful(numbers)} | (set() if direct else {"storage"})
    uncalibrated |= set() if quiet else set(what)
    for kind in ("machine", "link", "storage"):
        made[kind] = {
            "kind": kind, "name": names.get(kind, f"{stem}-storage"), "description": what[kind],
            "calibrated": kind not in uncalibrated, "measured_on": dict(here),
        }  # fmt: skip
    made["machine"] |= {"dispatch": "eager", "link": files.link.name, "storage": files.storage.name}
    made["machine"]["device"] = {"unified_memory": unified}
    for path, number in numbers.items():
        into = made[kind_of(path)]
        *groups, key = path.removeprefix(f"{kind_of(path)}.").split(".")
        for group in groups:
            into = into.setdefault(group, {})
        into[key] = quantity(key, number, here["date"])
    return made


def quantity(key: str, number: Number, date: str) -> Values:
    """A number as profiles have it: four digits, except for what is counted."""
    value = round(number.value) if key in WHOLE else float(f"{number.value:.4g}")
    source = f"measured here on {date}: {number.how}" if number.kind == "measured" else number.how
    found = {"value": value, "unit": UNITS.get(key, "s"), "kind": number.kind, "source": source}
    return found | ({"note": number.note} if number.note else {})


def write(made: Values, files: Files) -> None:
    """All under temporary names first, then renamed, the machine last. Raises InputError when that fails."""
    paths = files.of()
    parts = {kind: path.with_name(f".{path.name}.part") for kind, path in paths.items()}
    try:
        for kind, part in parts.items():
            part.write_text(HEADER + yaml.safe_dump(made[kind], sort_keys=False, width=120), encoding="utf-8")
        for kind in reversed(paths):
            parts[kind].replace(paths[kind])
    except OSError as error:
        raise InputError(f"--out {files.machine}: cannot write there ({error.strerror}); choose another") from None
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()


def _driver() -> str:
    for file in DRIVERS:
        try:
            return "driver " + file.read_text(encoding="utf-8").splitlines()[0].strip()
        except (OSError, UnicodeDecodeError, IndexError):
            continue
    return ""
