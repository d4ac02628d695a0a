"""Record the routing of a transformers model while it runs, without touching what it computes.

    with record_routing(model, "trace.parquet", lookahead=4) as recording:
        model.generate(**tokenizer(prompts, return_tensors="pt", padding=True), max_new_tokens=64)

Hooks only read. On an accelerator everything that one forward pass decided leaves in one asynchronous copy and is
looked at some passes later, so the device never waits for the recording.
"""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..errors import InputError
from .host_ring import HostRing, Layout, pack
from .model_spec import BITS, ModelSpec
from .models import spec_from_config
from .recorded_rows import RowBuilder, Sequences
from .routers import Gate, MoeLayer, Reading, Stack, experts_call, family, find_stacks, score_rule
from .trace import DECODE, PREFILL, Request, TraceMeta
from .writer import TraceWriter

BLOCK_ROWS = 4096  # rows gathered before the writer sees them

Hook = Callable[..., None]


@dataclass(frozen=True)
class Recorded:
    """Which optional columns a recording carries."""

    lookahead: int = 0  # distances 1..lookahead; 0 = no column
    width: int = 0  # predictions per distance (K'); 0 = top-k
    lookahead_weights: bool = True
    weights: bool = True
    probs: bool = False
    timing: bool = False  # step_ns


@dataclass
class Step:
    """One forward pass of one stack, from its first hook until its rows are made. T = B * S tokens."""

    stack: Stack
    index: int
    sequences: Sequences
    shape: tuple[int, int]  # B, S
    phase: int
    inputs: dict[str, Tensor]  # token [T] and live [T], where the model was given them
    clock: tuple[Any, Any] | None = None
    ids: dict[int, Tensor] = field(default_factory=dict)  # MoE layer -> [T, K]
    weights: dict[int, Tensor] = field(default_factory=dict)  # MoE layer -> [T, K]
    probs: dict[int, Tensor] = field(default_factory=dict)  # MoE layer -> [T, E]
    window: deque[tuple[int, Tensor]] = field(default_factory=deque)  # (lookahead row, router input [T, H])
    places: list[tuple[int, int]] = field(default_factory=list)  # (lookahead row, distance) of each guess
    guesses: list[Tensor] = field(default_factory=list)  # [T, K']
    guess_scores: list[Tensor] = field(default_factory=list)  # [T, K']
    layout: Layout = field(default_factory=list)

    def packed(self, small: torch.dtype, device: torch.device) -> Tensor:
        """Everything that the pass decided, as bytes on `device`, with ids as `small`; tensors are let go of."""

        def stacked(parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
            here = [part if part.device == device else part.to(device, non_blocking=True) for part in parts]
            return torch.stack(here, 1).to(dtype)

        columns = {}
        if "token" in self.inputs:
            columns["token"] = self.inputs["token"].to(device).to(torch.int32)
        for name, by_layer in (("weights", self.weights), ("probs", self.probs)):
            if by_layer:
                columns[name] = stacked([by_layer[layer] for layer in sorted(by_layer)], torch.float16)
        if self.guesses:
            columns["lookahead_weights"] = stacked(self.guess_scores, torch.float16)
            columns["lookahead"] = stacked(self.guesses, small)
        columns["experts"] = stacked([self.ids[layer] for layer in sorted(self.ids)], small)
        if "live" in self.inputs:
            columns["live"] = self.inputs["live"].to(device).to(torch.uint8)
        payload, self.layout = pack(columns)
        for held in (self.inputs, self.ids, self.weights, self.probs, self.window, self.guesses, self.guess_scores):
            held.clear()
        return payload


@contextmanager
def record_routing(
    model: Any,
    destination: str | Path | TraceWriter,
    *,
    lookahead: int = 0,
    lookahead_width: int = 0,
    lookahead_weights: bool = True,
    weights: bool = True,
    probs: bool = False,
    timing: bool = False,
    stop_tokens: Sequence[int] | None = None,
    spec: ModelSpec | None = None,
    recorded: Mapping[str, Any] | None = None,
    licence: str = "",
) -> Iterator[Recording]:
    """Record every forward pass that `model` makes inside the block.

    `destination` is a new trace file, or an open `TraceWriter` that the caller finishes. Each row of a batch is one
    request; a pass without cached keys starts new requests. `lookahead` D records distances 1..D with
    `lookahead_width` predictions each (default: top-k); `probs` the full router distribution; `timing` the start and
    end of each pass. `stop_tokens` end a sequence (default: those of the model's generation config).

    Raises InputError for a model whose routing cannot be recorded, or not with these options. When the block raises,
    no file is left.
    """
    options = Recorded(lookahead, lookahead_width, lookahead_weights, weights, probs, timing)
    recording = Recording(model, options, stop_tokens=stop_tokens, spec=spec)
    if isinstance(destination, TraceWriter):
        with recording.into(destination):
            yield recording
        return
    with TraceWriter(destination, recording.meta(licence)) as writer:
        with recording.into(writer):
            yield recording
        writer.finish(requests=recording.requests(), recorded=dict(recorded or {}))


class Recording:
    """A model being recorded. `rows` and `steps` count what was recorded so far.

    Raises InputError, naming the family, when the model's routing is out of reach.
    """

    def __init__(
        self,
        model: Any,
        options: Recorded,
        *,
        stop_tokens: Sequence[int] | None = None,
        spec: ModelSpec | None = None,
        name: str = "",
    ) -> None:
        self.model, self.options, self.family = model, options, family(model)
        self.stacks = find_stacks(model)
        self.layers = [layer for stack in self.stacks for layer in stack.layers]
        self.spec = spec or spec_of(model, name)
        self.stop_tokens = own_stop_tokens(model) if stop_tokens is None else list(stop_tokens)
        self._check()
        self.width = options.width or self.spec.top_k
        self.small = torch.uint8 if self.spec.experts <= 255 else torch.int16
        self.gates = self._gates()
        self.builder = RowBuilder(
            layers=len(self.layers),
            distances=options.lookahead,
            width=self.width,
            weights=options.weights,
            lookahead_weights=options.lookahead_weights,
            stop_tokens=self.stop_tokens,
            image_tokens=_image_tokens(model),
        )
        self.rows = self.steps = 0
        self._facts: list[dict[str, Any]] = []  # per request
        self._sequences: Sequences | None = None
        self._open: Step | None = None
        self._verified: set[int] = set()  # gates that have reproduced their own layer's choice
        self._ring = HostRing(torch.device("cpu"))
        self._blocks: list[dict[str, NDArray[Any]]] = []
        self._written = 0  # of `rows`
        self._writer: TraceWriter | None = None

    def meta(self, licence: str = "") -> TraceMeta:
        """What a writer for this recording must be opened with."""
        return TraceMeta(self.spec, licence=licence, lookahead_distances=tuple(range(1, self.options.lookahead + 1)))

    @property
    def batch(self) -> list[int]:
        """Requests of the latest batch, in row order."""
        return [] if self._sequences is None else [int(request) for request in self._sequences.requests]

    def note(self, request: int, **facts: Any) -> None:
        """Set what only the caller knows of a request: `domain`, `stop_reason`, `output_tokens`, `arrival_s`."""
        self._facts[request].update(facts)

    def requests(self) -> tuple[Request, ...]:
        """A record per request. Complete once the recording has ended."""
        paired = len(self.stacks) > 1
        return tuple(_request(number, facts, paired) for number, facts in enumerate(self._facts))

    @contextmanager
    def into(self, writer: TraceWriter) -> Iterator[None]:
        """Hook the model and append its rows to `writer` until the block ends."""
        self._writer, self._ring = writer, HostRing(self.model.device)
        handles = self._attach()
        try:
            yield
        finally:
            self._open = None
            for handle in handles:
                handle.remove()
        self._drain(everything=True)

    def _check(self) -> None:
        spec, options, found = self.spec, self.options, len(self.layers)
        if found != len(spec.moe_layers):
            raise InputError(
                f"model family {self.family}: {found} MoE layers found where its configuration says "
                f"{len(spec.moe_layers)}"
            )
        if not 0 <= options.lookahead <= found:
            raise InputError(f"--lookahead {options.lookahead} must lie in 0..{found}, the number of MoE layers")
        if options.lookahead and len(self.stacks) > 1:
            raise InputError(f"model family {self.family}: --lookahead is not defined across encoder and decoder")
        if options.width and not spec.top_k <= options.width <= spec.experts:
            raise InputError(
                f"--lookahead-width {options.width} must lie in {spec.top_k}..{spec.experts}, top-k to all experts"
            )

    def _gates(self) -> dict[int, Gate]:
        """Gates by MoE layer, where the router must be read or asked again."""
        asked = bool(self.options.lookahead or self.options.probs)
        return {
            layer.index: Gate(layer, self.family, self.spec.experts)
            for layer in self.layers
            if asked or layer.experts is None
        }

    # -- hooks, in the order in which they fire

    def _attach(self) -> list[Any]:
        handles: list[Any] = []
        for stack in self.stacks:
            handles.append(stack.module.register_forward_pre_hook(self._begin(stack), with_kwargs=True))
            handles.append(stack.module.register_forward_hook(self._end))
            if self.options.lookahead:
                handles.append(stack.first.register_forward_pre_hook(self._embedding, with_kwargs=True))
        for layer in self.layers:
            if layer.experts is not None:
                handles.append(layer.experts.register_forward_pre_hook(self._dispatched(layer), with_kwargs=True))
            if layer.router is not None and layer.index in self.gates:
                handles.append(layer.router.register_forward_hook(self._routed(layer), with_kwargs=True))
        return handles

    def _begin(self, stack: Stack) -> Hook:
        names = list(inspect.signature(stack.module.forward).parameters)

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._open = self._start(stack, {**dict(zip(names, args, strict=False)), **kwargs})

        return hook

    def _start(self, stack: Stack, given: Mapping[str, Any]) -> Step:
        tokens = given.get("input_ids")
        shape = batch_shape(tokens if tokens is not None else given.get("inputs_embeds"))
        sequences, first = self._meet(stack, shape[0], cached_tokens(given.get("past_key_values")))
        phase = PREFILL if stack.role != "cross" and (first or shape[1] > 1) else DECODE
        inputs = {} if tokens is None else {"token": tokens.detach().reshape(-1)}
        mask = given.get("attention_mask") if stack.role != "cross" else None
        if isinstance(mask, Tensor) and mask.ndim == 2:
            inputs["live"] = mask.detach()[:, -shape[1] :].reshape(-1)
        elif mask is not None and phase == PREFILL and shape[0] > 1:
            raise InputError("padding cannot be told from text: pass a two-dimensional attention_mask to the model")
        step = Step(stack, self.steps, sequences, shape, phase, inputs)
        step.window = deque(maxlen=self.options.lookahead or 1)
        step.clock = (self._ring.now(), None) if self.options.timing else None
        self.steps += 1
        return step

    def _meet(self, stack: Stack, batch: int, past: int) -> tuple[Sequences, bool]:
        """The sequences of this pass, and whether it is their first: without cached keys requests are new."""
        known = self._sequences
        if known is not None and len(known.requests) == batch and (past or self._follows_encoder(stack)):
            return known, False
        numbers = np.arange(len(self._facts), len(self._facts) + batch)
        self._facts += [{"prefill": 0, "decode": 0} for _ in range(batch)]
        self._sequences = Sequences(numbers, np.full(batch, past), np.zeros(batch, bool))
        return self._sequences, True

    def _follows_encoder(self, stack: Stack) -> bool:
        return stack.role == "cross" and len(self.stacks) > 1

    def _embedding(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs.get("hidden_states")
        if self._open is None:
            return
        if not isinstance(hidden, Tensor) or hidden.ndim != 3:
            raise InputError(f"model family {self.family}: no embedding [B, S, H] enters layer 0, so no --lookahead")
        self._open.window.append((0, hidden.detach().reshape(-1, hidden.shape[-1]).clone()))

    def _dispatched(self, layer: MoeLayer) -> Hook:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._open is not None:
                self._keep(self._open, layer, *experts_call(args, kwargs))

        return hook

    def _routed(self, layer: MoeLayer) -> Hook:
        gate = self.gates[layer.index]

        @torch.no_grad()
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            step = self._open
            if step is None:
                return
            hidden, reading = gate.seen(args, kwargs, output)
            if layer.experts is None:
                self._keep(step, layer, reading.ids, reading.weights)
            if layer.index not in self._verified and (self.options.probs or self.options.lookahead):
                self._verify(gate, hidden, reading)
            if self.options.probs:
                step.probs[layer.index] = gate.scores(reading.logits).half()
            if self.options.lookahead:
                self._look_ahead(step, gate, hidden)

        return hook

    def _keep(self, step: Step, layer: MoeLayer, ids: Tensor, weights: Tensor) -> None:
        expected = (step.shape[0] * step.shape[1], self.spec.top_k)
        if tuple(ids.shape) != expected:
            raise InputError(
                f"model family {self.family}: MoE layer {layer.index} routed {tuple(ids.shape)} where {expected} "
                "(tokens, top-k) was expected"
            )
        step.ids[layer.index] = ids
        step.weights[layer.index] = weights  # always: they give the ids their order

    def _verify(self, gate: Gate, hidden: Tensor, reading: Reading) -> None:
        """Once per layer: the score must explain the weights, and the gate asked again must choose the same."""
        gate.score = score_rule(reading, self.spec.routing.score, self.family)
        again = gate(hidden.clone()) if self.options.lookahead else reading
        if not torch.equal(again.ids.sort(-1).values, reading.ids.sort(-1).values):
            raise InputError(
                f"model family {self.family}: repeating the routing of MoE layer {gate.layer.index} gives other "
                "experts, so --lookahead and --probs are not available for it"
            )
        self._verified.add(gate.layer.index)

    def _look_ahead(self, step: Step, gate: Gate, hidden: Tensor) -> None:
        """What this gate makes of the inputs of the layers before it, all sources in one call."""
        target, sources = gate.layer.index, list(step.window)
        if any(source.shape[-1] != hidden.shape[-1] for _, source in sources):
            raise InputError(f"model family {self.family}: router inputs differ in width, so no --lookahead")
        reading = gate(torch.cat([source.to(hidden.device) for _, source in sources]))
        scores = gate.scores(reading.logits)
        ids = _widened(reading.ids, scores, self.width)
        tokens = hidden.shape[0]
        step.places += [(row, target + 1 - row) for row, _ in sources]
        step.guesses += torch.split(ids, tokens)
        step.guess_scores += torch.split(scores.gather(-1, ids).half(), tokens)
        # A copy: the block may go on to change its input in place
        step.window.append((target + 1, hidden.detach().clone()))

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        step, self._open = self._open, None
        if step is None or module is not step.stack.module:
            return
        if len(step.ids) != len(step.stack.layers):
            raise InputError(f"model family {self.family}: {len(step.ids)} of {len(step.stack.layers)} MoE layers ran")
        if step.clock is not None:
            step.clock = (step.clock[0], self._ring.now())
        with torch.no_grad():
            self._ring.push(step.packed(self.small, self._ring.device), step)
        self._drain()

    def _drain(self, everything: bool = False) -> None:
        """Make rows of the copies that have landed; hand them to the writer in blocks."""
        for step, payload in self._ring.ready(everything):
            columns = self.builder.rows(step, payload, self._facts)
            if step.clock is not None:
                times = [self._ring.nanoseconds(mark) for mark in step.clock]
                columns["step_ns"] = np.tile(np.array([times], np.int64), (len(columns["step"]), 1))
            if len(columns["step"]):
                self._blocks.append(columns)
                self.rows += len(columns["step"])
        if self._blocks and (everything or self.rows - self._written >= BLOCK_ROWS):
            assert self._writer is not None
            joined = {name: np.concatenate([block[name] for block in self._blocks]) for name in self._blocks[0]}
            self._blocks, self._written = [], self.rows
            self._writer.append(**joined)


def spec_of(model: Any, name: str = "") -> ModelSpec:
    """The model's shapes from its configuration, with the number format of its loaded weights."""
    spec = spec_from_config(model.config.to_dict(), name=name)
    dtype = str(model.dtype).removeprefix("torch.")
    return replace(spec, dtype=dtype) if dtype in BITS and not spec.expert_dtype else spec


def _widened(ids: Tensor, scores: Tensor, width: int) -> Tensor:
    """The gate's own choice [n, K], followed by the next experts by score up to `width`."""
    more = width - ids.shape[-1]
    if not more:
        return ids
    rest = scores.scatter(-1, ids, -torch.inf)
    return torch.cat([ids, rest.topk(more, dim=-1).indices], -1)


def cached_tokens(past: Any) -> int:
    """Tokens of each sequence whose keys are cached already, by the first layer that counts them."""
    cache = getattr(past, "self_attention_cache", past)
    for layer in getattr(cache, "layers", ()):
        length = int(layer.get_seq_length()) if hasattr(layer, "get_seq_length") else 0
        if length:
            return length
    return 0


def _request(number: int, facts: Mapping[str, Any], paired: bool) -> Request:
    decode = facts["decode"]
    # The last token that a decoder-only model produces is never fed back: it has no row
    output = decode if paired else decode + 1 if decode or "stop_reason" in facts else None
    return Request(
        number,
        prompt_tokens=facts["prefill"],
        output_tokens=facts.get("output_tokens", output),
        arrival_s=facts.get("arrival_s"),
        stop_reason=facts.get("stop_reason"),
        domain=facts.get("domain"),
    )


def batch_shape(tokens: Any) -> tuple[int, int]:
    """B, S of input ids [B, S] or embeddings [B, S, H]. Raises InputError for neither."""
    if not isinstance(tokens, Tensor):
        raise InputError("the model was called with neither input_ids nor inputs_embeds: nothing to record")
    return int(tokens.shape[0]), int(tokens.shape[1])


def own_stop_tokens(model: Any) -> list[int]:
    """Tokens that end a sequence by the model's generation config."""
    stop = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return [] if stop is None else [stop] if isinstance(stop, int) else [int(token) for token in stop]


def _image_tokens(model: Any) -> list[int]:
    names = ("image_token_id", "image_token_index", "video_token_id")
    return [value for name in names if isinstance(value := getattr(model.config, name, None), int)]
