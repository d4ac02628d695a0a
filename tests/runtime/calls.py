"""How the tests call a model, and one way to offload it for an experiment."""

from __future__ import annotations

from typing import Any

import torch
from families import tiny_model
from moeflow.policies.policy import Policy
from moeflow.runtime.backend import HostBackend
from moeflow.runtime.offload import Offload, load_policy, servable
from moeflow.runtime.told import Told

MODELS: dict[tuple[str, torch.dtype], Any] = {}


def model_of(family: str, dtype: torch.dtype = torch.float32) -> Any:
    """A tiny model, made once; whoever offloads it detaches it again."""
    if (family, dtype) not in MODELS:
        MODELS[family, dtype] = tiny_model(family).to(dtype)
    return MODELS[family, dtype]


def inputs(batch: int, padded: bool, length: int = 7) -> dict[str, torch.Tensor]:
    """Prompts, padded on the left by up to four tokens."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 90, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(batch if padded else 0):
        ids[row, : (row + 1) % 5] = 0
        mask[row, : (row + 1) % 5] = 0
    return {"input_ids": ids, "attention_mask": mask}


def generate(model: Any, batch: int, padded: bool, new_tokens: int = 4) -> list[torch.Tensor]:
    """Sequences, and the logits of every step."""
    made = model.generate(
        **inputs(batch, padded), max_new_tokens=new_tokens, do_sample=False, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    return [made.sequences, *made.logits]


@torch.inference_mode()
def everything(model: Any) -> list[torch.Tensor]:
    """Logits of prefill and decode, batch 1 and 8, padded and not."""
    found = []
    for batch, padded in ((1, False), (1, True), (8, False), (8, True)):
        found += [model(**inputs(batch, padded)).logits, *generate(model, batch, padded)]
    return found


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def offloaded(model: Any, policy: Any = "lru", budget: Any = 0.4, backend: Any = None, told: bool = False) -> Offload:
    """An `Offload` that keeps its decision log and, with `told`, a trace of what its policies were told."""
    chosen: Policy = servable(load_policy(policy))
    made = Offload.of_model(model, chosen, budget, backend=backend or HostBackend(), keep_log=True)
    if told:
        made.decisions.told = Told(made.decisions.meta)
    return made
