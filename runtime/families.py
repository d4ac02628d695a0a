"""Which model families of the installed transformers can be offloaded, and why the others cannot."""

from __future__ import annotations

import re
from pathlib import Path

import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ..errors import InputError
from ..traces.models import ROUTING, spec_from_config

DECORATED = re.compile(r"^@use_experts_implementation", re.MULTILINE)
ROUTED = re.compile(r"^class \w*(Experts|SparseM[oO][eE]|Router|M[oO]E|TopK)\w*\(", re.MULTILINE)


def known_families() -> tuple[list[str], dict[str, str]]:
    """(served, refused with the reason), by transformers' folder names.

    Judged by each family's source and default configuration: what a checkpoint holds is looked at when it is loaded.
    """
    served, refused = [], {}
    for file in sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")):
        name, source = file.stem.removeprefix("modeling_"), file.read_text(encoding="utf-8")
        if not DECORATED.search(source):
            if ROUTED.search(source):
                refused[name] = "its experts do not go through transformers' experts interface"
            continue
        reason = _unreadable(name)
        if reason is None:
            served.append(name)
        else:
            refused[name] = reason
    return served, refused


def _unreadable(name: str) -> str | None:
    """Why a family's configuration does not say what has to be known; None where it does."""
    if name in ROUTING:
        return None
    found = next((kind for kind in (name, f"{name}_text") if kind in CONFIG_MAPPING), None)
    if found is None:
        return "transformers registers no configuration under its name"
    try:
        spec_from_config(CONFIG_MAPPING[found]().to_dict() | {"dtype": "bfloat16"})
    except InputError as error:
        return str(error).partition(": ")[2].partition(";")[0]
    except Exception as error:  # a configuration that has no defaults at all
        return f"its default configuration cannot be made ({type(error).__name__})"
    return None
