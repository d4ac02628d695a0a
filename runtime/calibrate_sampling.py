"""What transformers' `generate` adds to each token beside the model's own passes: choosing it, and when to stop."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.utils import logging

from ..traces.bundled import TINY_MOE
from .calibrate_number import Number, Numbers
from .calibrate_subject import Subject
from .calibrate_timing import repeated

PROMPT = 8  # tokens. Chosen here


def sampling(subject: Subject) -> Numbers:
    """The bundled tiny model generates greedily; the same passes without `generate`, read back each, are taken off."""
    model = _loaded(subject.device)
    ids = torch.full((1, PROMPT), 5, device=subject.device)
    mask, count = torch.ones_like(ids), subject.effort.tokens
    settings: dict[str, Any] = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False}

    @torch.inference_mode()
    def passes() -> None:
        cache, now = DynamicCache(config=model.config), ids
        for step in range(count):
            seen = torch.ones(1, PROMPT + step, dtype=torch.int64, device=subject.device)
            logits = model(now, attention_mask=seen, past_key_values=cache, logits_to_keep=1).logits
            now = logits[:, -1].argmax(-1, keepdim=True)
            now.cpu()

    def whole() -> None:
        model.generate(ids, attention_mask=mask, **settings)

    generated = repeated(lambda: subject.seconds(whole), subject.effort)
    passed = repeated(lambda: subject.seconds(passes), subject.effort)
    how = f"transformers' greedy generate of {count} tokens ({generated}) less its passes ({passed})"
    seconds = max(0.0, generated.seconds - passed.seconds) / count
    return {"host.sample_s": Number(seconds, how, scatter=max(generated.spread, passed.spread))}


def _loaded(device: torch.device) -> Any:
    """The model, without the bar that transformers draws for it."""
    drawn = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        return AutoModelForCausalLM.from_pretrained(TINY_MOE, experts_implementation="batched_mm").to(device)
    finally:
        if drawn:
            logging.enable_progress_bar()
