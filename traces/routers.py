"""Where a transformers model routes: its MoE layers, and each layer's router, callable on any router input.

Families whose experts class carries `use_experts_implementation` are found by that decorator alone. The others are
entered here, in a line or a short function each, or refused by name.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers.integrations.moe import use_experts_implementation

from ..errors import InputError

ABSENT = -1  # a token that no expert serves; becomes all ones in the trace
ROUTER_NAMES = ("gate", "router")
DISPATCHER = inspect.unwrap(use_experts_implementation).__code__.co_filename
MATCHES = 0.02  # of a token's whole weight: bfloat16 weights carry 8 bits

# Experts classes without the decorator whose forward takes the same (hidden_states, top_k_index, top_k_weights).
SAME_CALL = frozenset({"DbrxExperts"})


class Reading(NamedTuple):
    """What one router call decided, for T tokens."""

    ids: Tensor  # [T, K] int64, ABSENT where no expert serves the token
    weights: Tensor  # [T, K]
    logits: Tensor  # [T, E]


def _read_switch(router: Any, output: Any) -> Reading:
    dispatch, probability, logits = output  # [B, S, E] one-hot or zero beyond capacity, [B, S, 1], [B, S, E]
    experts = dispatch.shape[-1]
    dispatch = dispatch.reshape(-1, experts)
    dropped = dispatch.sum(-1, keepdim=True) == 0
    ids = dispatch.argmax(-1, keepdim=True).masked_fill(dropped, ABSENT)
    return Reading(ids, probability.reshape(-1, 1).masked_fill(dropped, 0), logits.reshape(-1, experts))


def _read_llama4(router: Any, output: Any) -> Reading:
    scores, logits = output  # [T, E] each; scores are zero for experts that were not chosen
    ids = logits.topk(router.top_k, dim=-1).indices
    return Reading(ids, scores.gather(-1, ids), logits)


# Families whose experts see no ids at all: the router's output is read instead.
ROUTER_ADAPTERS: dict[str, Callable[[Any, Any], Reading]] = {
    "SwitchTransformersTop1Router": _read_switch,
    "Llama4Router": _read_llama4,
}


@dataclass(frozen=True)
class MoeLayer:
    """One MoE layer of a loaded model."""

    index: int  # among all MoE layers
    layer: int  # among the layers of its stack
    block: nn.Module  # holds the router and the experts
    router: nn.Module | None
    experts: nn.Module | None  # its arguments carry ids and weights; None: the router's output does


@dataclass(frozen=True)
class Stack:
    """Layers that run together: a forward pass of `module` is one step."""

    module: nn.Module
    first: nn.Module  # its layer 0
    role: str  # decoder | encoder | cross (the decoder of an encoder-decoder)
    layers: tuple[MoeLayer, ...]


def family(model: Any) -> str:
    """The model type that a message names, such as `qwen3_moe`."""
    return str(getattr(model.config, "model_type", type(model).__name__))


def find_stacks(model: Any) -> tuple[Stack, ...]:
    """The stacks of `model` that hold MoE layers, in execution order.

    Raises InputError for a dense model and, by name, for a family whose routing is out of reach.
    """
    places = _routed_places(model)
    if not places:
        raise InputError(_why_nothing(model))
    groups: dict[str, list[tuple[int, str]]] = {}
    for path in places:
        match = re.match(r"(.*?)\.(\d+)(\.|$)", path)
        if match is None:
            raise InputError(f"model family {family(model)}: MoE block {path!r} is not in a list of layers")
        groups.setdefault(match[1], []).append((int(match[2]), path))
    paired = bool(getattr(model.config, "is_encoder_decoder", False))
    if not paired and len(groups) > 1:
        groups = _language_groups(model, groups)
    roles = _roles(model, list(groups), paired)
    return _stacks(model, places, groups, roles)


def _routed_places(model: Any) -> dict[str, tuple[nn.Module | None, nn.Module | None]]:
    """Path of every MoE block -> (router, experts)."""
    places: dict[str, tuple[nn.Module | None, nn.Module | None]] = {}
    for path, module in model.named_modules():
        block_path = path.rpartition(".")[0]
        if is_dispatched(module) or type(module).__name__ in SAME_CALL:
            block = model.get_submodule(block_path)
            places[block_path] = (_router_of(block), module)
        elif type(module).__name__ in ROUTER_ADAPTERS:
            places[block_path] = (module, None)
    return places


def is_dispatched(module: nn.Module) -> bool:
    """Whether the module's class was decorated with `use_experts_implementation`."""
    code = getattr(type(module).forward, "__code__", None)
    return code is not None and code.co_filename == DISPATCHER


def _router_of(block: nn.Module) -> nn.Module | None:
    for name in ROUTER_NAMES:
        router = getattr(block, name, None)
        if isinstance(router, nn.Module):
            return router
    return None


def _why_nothing(model: Any) -> str:
    routed = [type(m).__name__ for m in model.modules() if re.search(r"Experts|Router|M[Oo]E|TopK", type(m).__name__)]
    if not routed:
        return f"model family {family(model)} is dense: it has no experts to record"
    return (
        f"model family {family(model)} cannot be recorded: {routed[0]} passes no expert ids through transformers' "
        "experts interface; load an unquantised checkpoint or see docs/recording.md for the families that can"
    )


def _language_groups(model: Any, groups: dict[str, list[tuple[int, str]]]) -> dict[str, list[tuple[int, str]]]:
    """Only the text decoder's group, for models that also route elsewhere (vision, speech)."""
    decoder = model.get_decoder()
    inside = {id(module) for module in decoder.modules()}
    kept = {prefix: found for prefix, found in groups.items() if id(model.get_submodule(prefix)) in inside}
    if len(kept) != 1:
        raise InputError(
            f"model family {family(model)} routes in {len(groups)} separate stacks ({', '.join(groups)}): not supported"
        )
    return kept


def _roles(model: Any, prefixes: list[str], paired: bool) -> dict[str, tuple[str, nn.Module]]:
    if not paired:
        return {prefixes[0]: ("decoder", model)}
    encoder, decoder = model.get_encoder(), model.get_decoder()
    in_encoder = {id(module) for module in encoder.modules()}
    return {
        prefix: ("encoder", encoder) if id(model.get_submodule(prefix)) in in_encoder else ("cross", decoder)
        for prefix in prefixes
    }


def _stacks(
    model: Any,
    places: dict[str, tuple[nn.Module | None, nn.Module | None]],
    groups: dict[str, list[tuple[int, str]]],
    roles: dict[str, tuple[str, nn.Module]],
) -> tuple[Stack, ...]:
    stacks, index = [], 0
    for prefix in sorted(groups, key=lambda prefix: roles[prefix][0] != "encoder"):
        layers = []
        for layer, path in sorted(groups[prefix]):
            router, experts = places[path]
            layers.append(MoeLayer(index, layer, model.get_submodule(path), router, experts))
            index += 1
        role, module = roles[prefix]
        stacks.append(Stack(module, model.get_submodule(f"{prefix}.0"), role, tuple(layers)))
    return tuple(stacks)


def experts_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """(ids [T, K], weights [T, K]) from the arguments of an experts module: hidden states, ids, weights."""
    _, ids, weights, *_ = (*args, *kwargs.values())
    if ids.ndim != 2:
        ids, weights = ids.reshape(-1, ids.shape[-1]), weights.reshape(-1, weights.shape[-1])
    if weights.shape[-1] != ids.shape[-1]:  # dense scores [T, E]
        weights = weights.gather(-1, ids)
    return ids, weights


class Gate:
    """One layer's own router, callable on any router input once the model itself has called it.

    Raises InputError, naming the family, where its rule cannot be repeated from the router input alone.
    """

    def __init__(self, layer: MoeLayer, family: str, experts: int) -> None:
        if layer.router is None:
            raise InputError(f"model family {family}: no router beside the experts, so no --lookahead and no --probs")
        self.layer, self.family, self.experts = layer, family, experts
        self.router: Any = layer.router
        self.reader = ROUTER_ADAPTERS.get(type(layer.router).__name__)
        self.extra: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
        self.batched = False  # the router wants [B, S, H]
        self.score = "softmax"

    def seen(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> tuple[Tensor, Reading]:
        """Take in one call that the model made: (router input [T, H], what it decided)."""
        named = dict(kwargs)
        hidden = args[0] if args else named.pop("hidden_states")
        self.extra = (args[1:], named)
        for value in [*args[1:], *named.values()]:
            if isinstance(value, Tensor) and value.shape != (self.experts,):
                raise InputError(
                    f"model family {self.family}: its router reads more than the router input (a tensor of shape "
                    f"{tuple(value.shape)}), so --lookahead and --probs are not available for it"
                )
        self.batched = hidden.ndim == 3
        return hidden.reshape(-1, hidden.shape[-1]), self.read(output)

    def read(self, output: Any) -> Reading:
        """Sort out a router's return value by its place and its shape."""
        if self.reader is not None:
            return self.reader(self.router, output)
        if isinstance(output, Tensor):  # logits only: the block holds the rule
            chosen = self.layer.block.route_tokens_to_experts(output)  # type: ignore[operator]
            output = (output, *sorted(chosen, key=lambda part: not part.is_floating_point()))
        if not isinstance(output, tuple) or len(output) < 3 or output[2].is_floating_point():
            raise InputError(f"model family {self.family}: its router returns no expert ids")
        logits, weights, ids = (part.reshape(-1, part.shape[-1]) for part in output[:3])
        if logits.shape[-1] != self.experts:
            raise InputError(
                f"model family {self.family}: its router scores {logits.shape[-1]} classes for {self.experts} experts, "
                "so --lookahead and --probs are not available for it"
            )
        if weights.shape[-1] != ids.shape[-1]:
            weights = weights.gather(-1, ids)
        return Reading(ids, weights, logits)

    def __call__(self, hidden: Tensor) -> Reading:
        """What this gate decides for router inputs [n, H], whatever layer they come from."""
        hidden = hidden.to(next(self.router.parameters()).device)
        args, kwargs = self.extra
        # .forward: the hooks that record and those of other tools must not see this call
        return self.read(self.router.forward(hidden[None] if self.batched else hidden, *args, **kwargs))

    def scores(self, logits: Tensor) -> Tensor:
        """[n, E] float32: the family's own score of every expert."""
        return SCORES[self.score](logits.float())


SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda logits: logits.softmax(-1),
    "sigmoid": lambda logits: logits.sigmoid(),
    "given": lambda scores: scores,  # the router already returns probabilities
}


def score_rule(reading: Reading, expected: str, family: str) -> str:
    """Which score turns the logits into the weights that the router returned, up to a factor per token.

    `expected` (from the model's spec) is tried first and decides where the weights cannot tell (one expert per token).
    Raises InputError, naming the family, when none fits.
    """
    total = reading.logits.float().sum(-1)
    if bool((reading.logits >= 0).all()) and bool((total - 1).abs().max() < 0.01):
        return "given"
    if family == "phimoe":  # sparse mixer: each weight is a softmax over what is near the chosen one
        return "softmax"
    for name in [expected, *(name for name in SCORES if name not in (expected, "given"))]:
        picked = SCORES[name](reading.logits.float()).gather(-1, reading.ids.clamp(min=0))
        if bool(((_shares(reading.weights.float()) - _shares(picked)).abs() < MATCHES)[reading.ids >= 0].all()):
            return name
    raise InputError(
        f"model family {family}: its router's scores are neither softmax nor sigmoid of its logits, so --lookahead "
        "and --probs are not available for it"
    )


def _shares(weights: Tensor) -> Tensor:
    """[T, K]: each expert's part of its token's weight."""
    return weights / weights.sum(-1, keepdim=True).clamp(min=1e-20)
