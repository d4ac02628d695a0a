"""Prompts through an offloaded model, as `moeflow runtime generate` wants them."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..traces.generation import Prompt, check_context, encode, pad_token, padded
from ..traces.recorder import record_routing
from ..traces.timeline import chrome_trace
from ..traces.whole_file import write_whole
from .nvtx import nvtx_ranges
from .offload import Offload
from .timeline import Timeline


def continue_prompts(
    model: Any, source: str, prompts: list[str], new_tokens: int, chat: bool, record: Path | None,
    timeline: Path | None, nvtx: bool,
) -> dict[str, Any]:  # fmt: skip
    """Continue prompts greedily as one batch; returns texts, times and statistics as plain values."""
    offload: Offload = model.__dict__["_moeflow"]
    tokenizer = tokenizer_of(source)
    encoded = encode(tokenizer, [Prompt(text) for text in prompts], chat)
    check_context(model, encoded, new_tokens)
    pad = pad_token(model)
    ids, mask = (part.to(offload.backend.device) for part in padded(encoded, pad, left=True))
    with ExitStack() as stack:
        if record is not None:
            recorded = {"by": "moeflow runtime generate", "policy": offload.policy.name}
            stack.enter_context(record_routing(model, record, recorded=recorded))
        seen = stack.enter_context(Timeline(offload).attached()) if timeline is not None else None
        if nvtx:
            stack.enter_context(nvtx_ranges(offload))
        began = time.perf_counter()
        made = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, pad_token_id=pad
        )
        texts = made[:, ids.shape[1] :].tolist()
        seconds = time.perf_counter() - began
    if timeline is not None and seen is not None:
        title = f"moeflow runtime: {Path(source).name} on {offload.backend.device}, {offload.policy.name}"
        write_whole(timeline, chrome_trace(seen.spans(), title).encode())
    stops = offload._passes.stop_tokens
    kept = [_ended(tokens, stops) for tokens in texts]
    new = sum(len(tokens) for tokens in kept)
    return {
        "prompts": [
            {"prompt": prompt, "text": tokenizer.decode(tokens, skip_special_tokens=True), "tokens": tokens}
            for prompt, tokens in zip(prompts, kept, strict=True)
        ],
        "seconds": seconds,
        "new_tokens_per_s": new / seconds,
        "tokens_computed": int(mask.sum()) + new - len(kept),  # the last token of each is never fed back
        "stats": offload.statistics(),
    }


def tokenizer_of(source: str) -> Any:
    """The tokenizer of a checkpoint. Raises InputError when it has none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = " ".join(str(error).split()).partition(". ")[0]
        raise InputError(f"model {source}: has no tokenizer that can be loaded ({reason[:200]})") from None


def _ended(tokens: list[int], stops: list[int]) -> list[int]:
    """Up to its stop token; what follows in a batch is padding."""
    at = next((place for place, token in enumerate(tokens) if token in stops), None)
    return tokens if at is None else tokens[: at + 1]
