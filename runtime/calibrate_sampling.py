"""What transformers' `generate` adds to each token beside the model's own passes: choosing it, and when to stop."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ..traces.bundled import TINY_MOE
from .calibrate_number import Number, Numbers
from .calibrate_subject import Subject
from .calibrate_timing import repeated

PROMPT = 8  # tokens. Chosen here


def sampling(subject: Subject) -> Numbers:
    """Of a tiny model; its passes, until the device has drained, are left out, and so is the read-back."""
    model, count = _shallow(subject.device), subject.effort.tokens
    ids = torch.full((1, PROMPT), 5, device=subject.device)
    settings: dict[str, Any] = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False}
    began = inside = 0

    def enter(*_: Any) -> None:
        nonlocal began
        began = subject.now()

    def leave(*_: Any) -> None:
        nonlocal inside
        subject.drain()
        inside += subject.now() - began

    def once() -> float:
        nonlocal inside
        inside = 0
        whole = subject.seconds(lambda: model.generate(ids, attention_mask=torch.ones_like(ids), **settings))
        return (whole - inside / 1e9) / count

    model.register_forward_pre_hook(enter)
    model.register_forward_hook(leave)
    timing = repeated(once, subject.effort)
    read = repeated(lambda: subject.host_seconds(subject.read_back), subject.effort)
    how = f"what transformers' greedy generate of {count} tokens takes outside of the model, less sync_s, {timing}"
    return {"host.sample_s": Number(max(0.0, timing.seconds - read.seconds), how, scatter=timing.spread)}


def _shallow(device: torch.device) -> Any:
    """The bundled tiny model with a single layer and random weights: what it says does not matter here."""
    config = AutoConfig.from_pretrained(TINY_MOE, experts_implementation="batched_mm")
    config.num_hidden_layers = 1
    return AutoModelForCausalLM.from_config(config).eval().to(device)
