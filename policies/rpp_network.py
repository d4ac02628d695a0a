"""The network of the routing path predictor, and its training. Imports torch: only `rpp` imports this, when it runs.

A T5-like encoder and decoder (RMS norm first, no biases, ReLU) with one linear head per MoE layer. T5's learned
relative position bias is replaced by sinusoids of the position, which need no bucketing and no fixed length.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, relu, scaled_dot_product_attention

WINDOW = 512  # tokens that a token sees at most: the paper's cut of a prompt
EMBEDDING_SCALE, POSITION_SCALE = 0.02, 0.01  # at the start; small ones generalise better from little data


@dataclass(frozen=True)
class Shape:
    """Sizes. Hidden 32 and feed-forward 2048 are the paper's; heads and their width are those of `t5-small`, which the
    authors' code starts from; two blocks on either side instead of its six are chosen here, for a CPU's sake."""

    vocabulary: int
    layers: int  # MoE layers
    experts: int
    blocks: int = 2
    hidden: int = 32
    feed_forward: int = 2048
    heads: int = 8
    head_width: int = 64


@dataclass(frozen=True)
class Sequences:
    """B requests, padded: prompt [B, P] (a start token first) and decoded rows [B, D].

    `rows` are rows of the trace, -1 where padded; `seen` is the step in which a token becomes known (-1: the start
    token, a huge one: padding), so that whoever attends to what is no later sees nothing of the future.
    """

    prompt: Tensor
    prompt_position: Tensor
    prompt_seen: Tensor
    prompt_rows: NDArray[np.int64]
    decoded: Tensor
    decoded_position: Tensor
    decoded_seen: Tensor
    decoded_rows: NDArray[np.int64]


def _silent(layer: nn.Linear) -> nn.Linear:
    """A residual branch begins as nothing: training starts from what the token alone tells."""
    nn.init.zeros_(layer.weight)
    return layer


class Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        inner = shape.heads * shape.head_width
        self.heads = shape.heads
        self.norm = nn.RMSNorm(shape.hidden)
        self.query = nn.Linear(shape.hidden, inner, bias=False)
        self.key_value = nn.Linear(shape.hidden, 2 * inner, bias=False)
        self.out = _silent(nn.Linear(inner, shape.hidden, bias=False))

    def forward(self, states: Tensor, others: Tensor | None, mask: Tensor) -> Tensor:
        """States [B, n, h] look at `others` [B, m, h] (None: themselves) where mask [B, n, m] is true."""
        normed = self.norm(states)
        key, value = self.key_value(normed if others is None else others).chunk(2, dim=-1)
        split = [part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.query(normed), key, value)]
        mixed = scaled_dot_product_attention(split[0], split[1], split[2], attn_mask=mask[:, None])
        return states + self.out(mixed.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, shape: Shape, dropout: float) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(shape.hidden)
        self.up = nn.Linear(shape.hidden, shape.feed_forward, bias=False)
        self.down = _silent(nn.Linear(shape.feed_forward, shape.hidden, bias=False))
        self.dropout = nn.Dropout(dropout)

    def forward(self, states: Tensor) -> Tensor:
        return states + self.down(self.dropout(relu(self.up(self.norm(states)))))


class Block(nn.Module):
    """Attention to one's own kind, to the prompt where it is a decoder's, and a feed-forward part."""

    def __init__(self, shape: Shape, dropout: float, decodes: bool) -> None:
        super().__init__()
        self.attend = Attention(shape)
        self.look = Attention(shape) if decodes else None
        self.feed = FeedForward(shape, dropout)

    def forward(
        self, states: Tensor, mask: Tensor, prompt: Tensor | None = None, across: Tensor | None = None
    ) -> Tensor:
        states = self.attend(states, None, mask)
        if self.look is not None:
            states = self.look(states, prompt, across)
        return self.feed(states)


class Network(nn.Module):
    """Sequences in; logits [B, P, L, E] of prompt rows and [B, D, L, E] of decoded rows out, all layers in one pass."""

    def __init__(self, shape: Shape, dropout: float = 0.0) -> None:
        super().__init__()
        self.shape = shape
        self.embedding = nn.Embedding(shape.vocabulary + 1, shape.hidden)  # the last one starts every prompt
        nn.init.normal_(self.embedding.weight, std=EMBEDDING_SCALE)
        self.dropout = nn.Dropout(dropout)
        self.encoder = nn.ModuleList(Block(shape, dropout, decodes=False) for _ in range(shape.blocks))
        self.decoder = nn.ModuleList(Block(shape, dropout, decodes=True) for _ in range(shape.blocks))
        self.encoded, self.final = nn.RMSNorm(shape.hidden), nn.RMSNorm(shape.hidden)
        self.heads = nn.Linear(shape.hidden, shape.layers * shape.experts)  # one head per layer, side by side

    def forward(self, batch: Sequences) -> tuple[Tensor, Tensor]:
        prompt = self._embed(batch.prompt, batch.prompt_position)
        mask = _visible(batch.prompt_seen, batch.prompt_position, batch.prompt_seen, batch.prompt_position)
        for block in self.encoder:
            prompt = block(prompt, mask)
        encoded = self.encoded(prompt)
        if not batch.decoded.shape[1]:
            return self._path(encoded), encoded.new_zeros((len(encoded), 0, self.shape.layers, self.shape.experts))
        states = self._embed(batch.decoded, batch.decoded_position)
        mask = _visible(batch.decoded_seen, batch.decoded_position, batch.decoded_seen, batch.decoded_position)
        across = _visible(batch.decoded_seen, batch.decoded_position, batch.prompt_seen, batch.prompt_position)
        for block in self.decoder:
            states = block(states, mask, encoded, across)
        return self._path(encoded), self._path(self.final(states))

    def _embed(self, tokens: Tensor, position: Tensor) -> Tensor:
        half = self.shape.hidden // 2
        rate = torch.exp(torch.arange(half) * (-np.log(10_000) / half))
        angle = position[..., None] * rate
        return self.dropout(self.embedding(tokens) + POSITION_SCALE * torch.cat((angle.sin(), angle.cos()), dim=-1))

    def start_from(self, shares: Tensor) -> None:
        """Heads begin with how often each expert [L, E] is used at all."""
        kept = shares.clamp(1e-3, 1 - 1e-3).flatten()
        with torch.no_grad():
            self.heads.bias.copy_(torch.log(kept / (1 - kept)))
            self.heads.weight.normal_(std=EMBEDDING_SCALE)

    def _path(self, states: Tensor) -> Tensor:
        return self.heads(states).unflatten(-1, (self.shape.layers, self.shape.experts))


def _visible(seen: Tensor, position: Tensor, other_seen: Tensor, other_position: Tensor) -> Tensor:
    """[B, n, m]: what is known no later and lies at most WINDOW positions back; the start token always."""
    near = (position[:, :, None] - other_position[:, None, :]).abs() < WINDOW
    start = other_seen[:, None, :] < 0
    return start | (near & (other_seen[:, None, :] <= seen[:, :, None]))


PADDING = 2**40


def sequences(
    rows: list[tuple[NDArray[np.int64], NDArray[np.int64]]], columns: dict[str, Any], start: int
) -> Sequences:
    """Pad requests, each given as its prompt's rows and its decoded rows; `columns`: token, position, step [N]."""
    found: list[Any] = []
    for part, first in ((0, True), (1, False)):
        width = max(len(request[part]) for request in rows) + first
        padded = np.full((len(rows), width), -1, np.int64)
        for at, request in enumerate(rows):
            padded[at, first : first + len(request[part])] = request[part]
        there = padded >= 0
        token = np.where(there, columns["token"][padded], start)
        position = np.where(there, columns["position"][padded], 0)
        seen = np.where(there, columns["step"][padded], PADDING)
        if first:
            seen[:, 0] = -1
        found += [torch.from_numpy(token), torch.from_numpy(position), torch.from_numpy(seen), padded]
    return Sequences(*found)


def logits_of(network: Network, batch: Sequences) -> tuple[Tensor, NDArray[np.int64]]:
    """Logits [n, L, E] of the n real rows of a batch, and those rows."""
    prompt, decoded = network(batch)
    there = batch.prompt_rows >= 0, batch.decoded_rows >= 0
    chosen = torch.cat((prompt[torch.from_numpy(there[0])], decoded[torch.from_numpy(there[1])]))
    return chosen, np.concatenate((batch.prompt_rows[there[0]], batch.decoded_rows[there[1]]))


@dataclass(frozen=True)
class Training:
    """How it is trained. Loss, AdamW, weight decay and linear warm-up are the paper's, which tunes at 2e-5 (heads 2e-4)
    on 30,000 samples; from scratch on one trace the rates, dropout, initial scales and lengths are chosen here."""

    steps: int = 1000
    batch: int = 16  # requests
    body_rate: float = 3e-3
    head_rate: float = 3e-3
    warm_up: float = 0.1  # share of the steps
    weight_decay: float = 1e-4  # of the body
    dropout: float = 0.3
    seed: int = 0
    check_every: int = 50  # steps between two looks at the validation requests
    patience: int = 5  # looks without improvement before it stops


def fit(
    shape: Shape, training: Training, kept: list[Any], validating: list[Any], columns: dict[str, Any],
    paths: NDArray[np.bool_],
) -> Network:  # fmt: skip
    """Minimise the binary cross-entropy to `paths` [N, L, E] over the rows of the requests `kept`.

    `kept` and `validating` are requests as `sequences` takes them. The weights that do best on `validating` stay (the
    last ones where there are none). Progress goes to stderr.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training.seed)
        network = Network(shape, training.dropout)
        targets = torch.from_numpy(paths.astype(np.float32))
        network.start_from(targets[np.concatenate([rows for request in kept for rows in request])].mean(dim=0))
        return _fit(network, training, kept, validating, columns, targets)


def _fit(
    network: Network, training: Training, kept: list[Any], validating: list[Any], columns: dict[str, Any], paths: Tensor
) -> Network:
    heads = list(network.heads.parameters())
    body = [parameter for name, parameter in network.named_parameters() if not name.startswith("heads.")]
    optimiser = torch.optim.AdamW(
        [
            {"params": body, "lr": training.body_rate, "weight_decay": training.weight_decay},
            {"params": heads, "lr": training.head_rate, "weight_decay": 0.0},
        ]
    )
    warm_up = max(1, round(training.warm_up * training.steps))
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min((step + 1) / warm_up, (training.steps - step) / max(1, training.steps - warm_up))
    )
    best, best_loss, stale = {k: v.clone() for k, v in network.state_dict().items()}, float("inf"), 0
    order: list[int] = []
    for step in range(1, training.steps + 1):
        if len(order) < min(training.batch, len(kept)):
            order += torch.randperm(len(kept)).tolist()
        chosen, order = order[: training.batch], order[training.batch :]
        loss = _loss(network, [kept[i] for i in chosen], columns, paths)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        rate.step()
        if step % training.check_every == 0 or step == training.steps:
            judged = _validate(network, validating or kept, training.batch, columns, paths)
            of = "validation" if validating else "training"
            print(f"step {step} of {training.steps}: loss {loss.item():.4f}, {of} {judged:.4f}", file=sys.stderr)
            stale = 0 if judged < best_loss else stale + 1
            if judged < best_loss:
                best, best_loss = {k: v.clone() for k, v in network.state_dict().items()}, judged
            if stale == training.patience:
                break
    network.load_state_dict(best)
    return network.eval()


def _loss(network: Network, requests: list[Any], columns: dict[str, Any], paths: Tensor) -> Tensor:
    logits, rows = logits_of(network, sequences(requests, columns, network.shape.vocabulary))
    return binary_cross_entropy_with_logits(logits, paths[torch.from_numpy(rows)])


def _validate(network: Network, requests: list[Any], size: int, columns: dict[str, Any], paths: Tensor) -> float:
    network.eval()
    total = 0.0
    with torch.inference_mode():
        for first in range(0, len(requests), size):
            part = requests[first : first + size]
            total += float(_loss(network, part, columns, paths)) * len(part)
    network.train()
    return total / len(requests)


def probabilities(network: Network, requests: list[Any], columns: dict[str, Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Probabilities [n, L, E] of the requests' rows, and those rows."""
    with torch.inference_mode():
        logits, rows = logits_of(network, sequences(requests, columns, network.shape.vocabulary))
        return logits.sigmoid().numpy(), rows


def to_arrays(network: Network) -> dict[str, NDArray[Any]]:
    """The weights by name."""
    return {name: value.numpy() for name, value in network.state_dict().items()}


def from_arrays(shape: dict[str, int], arrays: dict[str, NDArray[Any]]) -> Network:
    """The inverse of `to_arrays`, ready to predict. Raises KeyError, TypeError or RuntimeError on misfits."""
    network = Network(Shape(**shape))
    network.load_state_dict({name: torch.from_numpy(np.array(value)) for name, value in arrays.items()})
    return network.eval()


def shape_settings(shape: Shape) -> dict[str, int]:
    """A shape as plain values."""
    return asdict(shape)
