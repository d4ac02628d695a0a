"""The files that a plan writes: policy.yaml, run-llama.sh, run-ktransformers.sh and plan.json."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from ..errors import InputError
from ..policies.policy import Policy
from .plan import GIB, Plan
from .plan_advice import advice, comment, ktransformers_options, llama_options, llama_override, settings


def contents(plan: Plan) -> dict[str, str]:
    """Text by file name."""
    return {
        "policy.yaml": _policy(plan),
        "run-llama.sh": _llama(plan),
        "run-ktransformers.sh": _ktransformers(plan),
        "plan.json": json.dumps({**plan.values, "advice": advice(plan), "settings": settings(plan)}, indent=2) + "\n",
    }


def write_plan(plan: Plan, folder: Path) -> None:
    """All files or none: each is complete under a temporary name before the first gets its own. Raises InputError."""
    texts, parts = contents(plan), {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            for name, text in texts.items():
                parts[name] = folder / f".{name}.part"
                parts[name].write_text(text, encoding="utf-8")
                parts[name].chmod(0o755 if name.endswith(".sh") else 0o644)
            for name, part in parts.items():
                part.replace(folder / name)
        finally:
            for part in parts.values():
                part.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"--out {folder}: cannot write there ({error.strerror}); choose another folder") from None


def _policy(plan: Plan) -> str:
    import yaml

    preset = settings(plan)["moeflow"]
    return f"# {_title(plan)}: preset {preset}.\n" + yaml.safe_dump(Policy.load(preset).document, sort_keys=False)


def _title(plan: Plan) -> str:
    return comment(f"{plan.values['model']} on {plan.values['hardware']['name']}, planned by moeflow")


def _sized(plan: Plan) -> str:
    size = plan.box.model.bytes_per_expert / 2**20
    return f"# Sized for experts of {size:.2f} MiB; plan again for weights of other precision."


def _llama(plan: Plan) -> str:
    override = llama_override(plan)
    instead = [f"# Without -ncmoe: {_shell(override)}"] if override else []
    lines = [
        "#!/bin/sh",
        f"# {_title(plan)}. usage: run-llama.sh MODEL.gguf [OPTION ...]",
        _sized(plan),
        *instead,
        "model=${1:?usage: run-llama.sh MODEL.gguf [OPTION ...]}",
        "shift",
        f'exec llama-server -m "$model" {_shell(llama_options(plan))} "$@"',
    ]
    return "\n".join(lines) + "\n"


def _ktransformers(plan: Plan) -> str:
    gib = plan.box.slots * plan.box.model.bytes_per_expert / GIB
    lines = [
        "#!/bin/sh",
        f"# {_title(plan)}. usage: run-ktransformers.sh MODEL_FOLDER [OPTION ...]",
        _sized(plan),
        f"# {gib:.1f} GiB of experts on the device, the same number in every layer: nothing is known of popularity.",
        "# CORES: physical ones; NODES: NUMA nodes.",
        "model=${1:?usage: run-ktransformers.sh MODEL_FOLDER [OPTION ...]}",
        "shift",
        'exec python -m sglang.launch_server --model "$model" --kt-weight-path "$model" '
        '--kt-cpuinfer "${CORES:-$(nproc)}" --kt-threadpool-count "${NODES:-1}" '
        f'{_shell(ktransformers_options(plan))} "$@"',
    ]
    return "\n".join(lines) + "\n"


def _shell(words: list[str]) -> str:
    return " ".join(map(shlex.quote, words))
