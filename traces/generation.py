"""Prompts through a model in batches while its routing is recorded."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, UnsupportedHardwareError
from .recorder import Recording

ACCELERATORS = ("cuda", "npu", "xpu")  # ROCm calls itself cuda


@dataclass(frozen=True)
class Prompt:
    """One text to continue, and where it comes from."""

    text: str
    domain: str | None = None


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. `temperature` 0 = greedy."""

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def arguments(self) -> dict[str, Any]:
        """For `generate`."""
        if not self.temperature:
            return {"do_sample": False, "max_new_tokens": self.max_new_tokens}
        return {
            "do_sample": True,
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": 0,
        }


def read_prompts(source: str, limit: int | None = None) -> list[Prompt]:
    """Prompts of a file or of stdin (`-`): one per line, or JSON lines with `prompt` or `text` and maybe `domain`.

    Raises InputError for a missing or empty source, and by line number for one that cannot be used.
    """
    try:
        text = sys.stdin.read() if source == "-" else Path(source).read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"prompts {source}: cannot be read ({error.strerror}); give a file or - for stdin") from None
    except UnicodeDecodeError:
        raise InputError(f"prompts {source}: is not UTF-8 text; convert it or give another file") from None
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    as_json = source.endswith((".jsonl", ".json")) or (source == "-" and bool(lines) and lines[0][1].startswith("{"))
    prompts = [_from_json(source, number, line) if as_json else Prompt(line.rstrip("\r")) for number, line in lines]
    if not prompts:
        raise InputError(f"prompts {source}: holds no prompts; give one per line")
    return prompts[:limit]


def _from_json(source: str, number: int, line: str) -> Prompt:
    where = f"prompts {source}, line {number}"
    try:
        values = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: is not JSON ({error}); write one object per line") from None
    if not isinstance(values, dict):
        raise InputError(f'{where}: is not an object; write {{"prompt": "..."}}')
    text = values.get("prompt", values.get("text"))
    if not isinstance(text, str) or not text.strip():
        raise InputError(f"{where}: has no text under prompt or text; add it")
    domain = values.get("domain")
    return Prompt(text, None if domain is None else str(domain))


def choose_device(name: str) -> torch.device:
    """`auto` (the accelerator, else the CPU), `cpu`, or an accelerator by name.

    Raises UnsupportedHardwareError when this machine lacks it.
    """
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if name == "cpu" or (name == "auto" and (found is None or found.type not in ACCELERATORS)):
        return torch.device("cpu")
    if name == "auto":
        assert found is not None
        return found
    if found is None or found.type != name.partition(":")[0]:
        has = f"has {found.type}" if found is not None else "has no accelerator that torch can use"
        raise UnsupportedHardwareError(f"--device {name}: this machine {has}; use --device auto or cpu")
    return torch.device(name)


def load_model(
    source: str,
    device: torch.device,
    *,
    dtype: str = "auto",
    experts_implementation: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """(model in eval mode on `device`, tokenizer) by hub id or folder. Raises InputError when there is none."""
    from transformers import AutoConfig, AutoTokenizer

    looks_like_a_path = re.match(r"[./~\\]|[A-Za-z]:\\", source) or source.count("/") > 1
    if looks_like_a_path and not Path(source).is_dir():
        raise InputError(f"model {source}: no such folder; give a folder or a Hugging Face model id")
    shared = {"revision": revision, "trust_remote_code": trust_remote_code}
    how = {} if experts_implementation is None else {"experts_implementation": experts_implementation}
    try:
        config = AutoConfig.from_pretrained(source, **shared)
        tokenizer = AutoTokenizer.from_pretrained(source, **shared)
        model = _loader(config).from_pretrained(source, dtype=dtype, **shared, **how)
    except (OSError, ValueError, ImportError, KeyError) as error:
        reason = " ".join(str(error).split()).partition(". ")[0]
        raise InputError(f"model {source}: cannot be loaded ({reason[:300]})") from None
    return model.to(device).eval(), tokenizer


def _loader(config: Any) -> Any:
    import transformers as hf
    from transformers.models.auto import modeling_auto

    if getattr(config, "is_encoder_decoder", False):
        return hf.AutoModelForSeq2SeqLM
    if config.model_type in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or hasattr(config, "auto_map"):
        return hf.AutoModelForCausalLM
    return hf.AutoModelForImageTextToText


def encode(tokenizer: Any, prompts: Sequence[Prompt], chat: bool) -> list[list[int]]:
    """Token ids of every prompt; with `chat`, inside the tokenizer's chat template."""
    if chat and not getattr(tokenizer, "chat_template", None):
        raise InputError("--chat: this model's tokenizer has no chat template; leave the option out")
    encoded = []
    for number, prompt in enumerate(prompts, 1):
        text = prompt.text
        if chat:
            turns = [{"role": "user", "content": text}]
            text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        ids = list(tokenizer(text, add_special_tokens=not chat)["input_ids"])
        if not ids:
            raise InputError(f"prompt {number} gives no tokens; leave it out")
        encoded.append(ids)
    return encoded


def check_context(model: Any, encoded: Sequence[Sequence[int]], new_tokens: int) -> None:
    """Raises InputError when the longest prompt and its continuation leave the model's positions."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(len(ids) for ids in encoded)
    if isinstance(positions, int) and not model.config.is_encoder_decoder and longest + new_tokens > positions:
        raise InputError(
            f"the longest prompt has {longest} tokens: with {new_tokens} new ones it leaves the model's {positions} "
            "positions; lower --max-new-tokens or --max-prompt-tokens"
        )


def generate_recorded(
    model: Any,
    recording: Recording,
    prompts: Sequence[Prompt],
    encoded: Sequence[list[int]],
    sampling: Sampling,
    batch_size: int,
    report: Callable[[int], None],
) -> None:
    """Continue every prompt, `batch_size` at a time; `report` gets the number of prompts done after each batch."""
    torch.manual_seed(sampling.seed)
    pad = pad_token(model)
    for start in range(0, len(encoded), batch_size):
        rows = encoded[start : start + batch_size]
        ids, mask = padded(rows, pad, left=not model.config.is_encoder_decoder)
        output = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            pad_token_id=pad,
            **sampling.arguments(),
        )
        made = output[:, 1 if model.config.is_encoder_decoder else ids.shape[1] :].tolist()
        for request, prompt, tokens in zip(recording.batch, prompts[start:], made, strict=False):
            recording.note(request, domain=prompt.domain, **_ending(tokens, recording.stop_tokens))
        report(min(start + batch_size, len(encoded)))


def _ending(tokens: list[int], stop_tokens: Sequence[int]) -> dict[str, Any]:
    at = next((place for place, token in enumerate(tokens) if token in stop_tokens), None)
    if at is None:
        return {"stop_reason": "length", "output_tokens": len(tokens)}
    return {"stop_reason": "eos", "output_tokens": at + 1}


def padded(rows: Sequence[Sequence[int]], pad: int, left: bool) -> tuple[Tensor, Tensor]:
    """(ids, mask), each int64 [B, S]."""
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), pad)
    mask = torch.zeros(len(rows), width, dtype=torch.int64)
    for number, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(0, len(row))
        ids[number, place] = torch.tensor(row)
        mask[number, place] = 1
    return ids, mask


def pad_token(model: Any) -> int:
    """Any valid token will do: padding is masked."""
    config = model.generation_config
    for token in (config.pad_token_id, config.eos_token_id):
        if token is not None:
            return int(token[0] if isinstance(token, list) else token)
    return 0
