"""How long each piece of work takes: the one place where bytes, operations and launches become time.

Every duration is an int64 number of picoseconds, so that engines only add and compare integers.
docs/model.md derives the formulas.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from math import fsum

import numpy as np
from numpy.typing import NDArray

from ..hwprofiles.profile import Hardware, NearMemory
from ..policies.compiled import bare
from ..policies.prices import LayerPrices, Prices
from ..traces.model_spec import BITS, ModelSpec
from .tiers import NEAR, PAGEABLE, PINNED, SSD, TIERS

PS_PER_SECOND = 10**12

# Kernels that one block issues in a tuned eager implementation. A 48-layer Qwen3-30B-A3B with offloaded experts
# was counted at 1,341 launches per token (kekzl/imp), 28 per layer; the split follows the operators of the block.
KERNELS = {
    "embed": 2, "attention": 16, "router": 5, "experts": 7, "shared": 5, "dense": 5, "gates": 2, "head": 4, "add": 1,
    "keep": 1,
}  # fmt: skip
MERGE_KERNELS = 2  # per layer: keys and values are gathered into their new batch
STAGED = 3  # times that a pageable copy passes host memory: read, written to the driver's pinned buffer, read again


def picoseconds(seconds: float) -> int:
    """Rounded to the nearest picosecond."""
    return round(seconds * PS_PER_SECOND)


def _nanoseconds(picoseconds: int) -> int:
    """Rounded to the nearest nanosecond."""
    return (picoseconds + 500) // 1000


def seconds(picoseconds: int) -> float:
    return picoseconds / PS_PER_SECOND


@bare
def block_ps(traffic_bytes, operations, bandwidth, flops, latency_s):  # type: ignore[no-untyped-def]
    """Picoseconds of kernels that take `latency_s` beside moving these bytes and doing these operations at once."""
    return round((max(traffic_bytes / bandwidth, operations / flops) + latency_s) * 1e12)


@dataclass(frozen=True)
class Block:
    """Work issued together: `launches` host calls, then `device_ps` of device time in sequence."""

    launches: int
    device_ps: int


@dataclass(frozen=True)
class Batch:
    """The tokens of one step, as attention sees them."""

    tokens: int
    attended: int  # sum over tokens of the keys each one attends to, itself included
    cached: int  # sum over requests of the keys read
    outputs: int  # tokens whose next token is sampled


class CostModel:
    """Durations of `model` on `hardware`. Kernel time = max(bytes / bandwidth, operations / rate) + kernel latency."""

    def __init__(self, hardware: Hardware, model: ModelSpec, devices: int = 1) -> None:
        device, host, link = hardware.device, hardware.host, hardware.link
        self.model = model
        self._bandwidth = device.memory_bandwidth * device.memory_achieved
        self._flops = device.flops * device.flops_achieved
        self._op_latency_s = device.op_latency_s
        self.graph = hardware.dispatch == "graph"
        self.issue_ps = picoseconds(host.graph_issue_s if self.graph else host.issue_s)
        self.launch_latency_ps = picoseconds(host.launch_latency_s)
        self.sync_ps = picoseconds(host.sync_s)
        self.sample_ps = picoseconds(host.sample_s)
        self.policy_ps = picoseconds(host.policy_s)
        self.submit_ps = picoseconds(link.submit_s)
        self.submit_batched_ps = picoseconds(link.submit_batched_s)
        self.copy_alpha_ps = picoseconds(link.h2d.alpha_s)
        storage = hardware.storage
        rate = min(storage.read_bandwidth, storage.queue_depth * storage.block_bytes / storage.latency_s)
        self._read_bandwidth, self._block_bytes = rate, storage.block_bytes
        self.read_alpha_ps = picoseconds(storage.latency_s)
        self.read_ps = self._read(model.bytes_per_expert)
        self._element = BITS[model.dtype] / 8
        self._expert_bits = BITS[model.expert_dtype or model.dtype]
        self._host_bandwidth, self._host_flops = host.memory_bandwidth, host.cpu_flops
        self._d2h, self._h2d, self._unified = link.d2h, link.h2d, device.unified_memory
        self._peer, self._devices = link.peer, devices
        self._near = hardware.near_memory
        self.copy_ps = self.copy_from(PINNED)
        self.experts = lru_cache(maxsize=None)(self._experts)

    def embed(self, batch: Batch) -> Block:
        """Token embedding and what else a step starts with."""
        return self._block("embed", batch.tokens * self.model.hidden * self._element, 0)

    def attention(self, batch: Batch) -> Block:
        """Norms, projections, scores over every cached key (quadratic over a prompt), output."""
        weight_bytes, key_bytes, per_token, per_key, _ = self.attention_prices()
        traffic = weight_bytes + key_bytes * (batch.cached + batch.tokens)
        return self._block("attention", traffic, batch.tokens * per_token + batch.attended * per_key)

    def attention_prices(self) -> tuple[float, float, int, int, float]:
        """What `attention` takes: bytes of weights and per cached token, operations per token and per key, latency."""
        attention = self.model.attention
        weights = attention.parameters(self.model.hidden)
        per_key = self.model.kv_bytes_per_token / self.model.layers
        latency = KERNELS["attention"] * self._op_latency_s
        return weights * self._element, per_key, 2 * weights, 2 * attention.score_width(), latency

    def router(self, batch: Batch) -> Block:
        """Norm and gate."""
        return self._matrices("router", self.model.experts * self.model.hidden, batch.tokens)

    def gates(self, batch: Batch, count: int) -> Block:
        """`count` other layers' gates evaluated on this layer's router input, for a prediction."""
        return self._matrices("gates", count * self.model.experts * self.model.hidden, batch.tokens)

    def shared(self, batch: Batch) -> Block:
        """The experts that every token uses."""
        return self._matrices(
            "shared", self.model.matrices * self.model.hidden * self.model.shared_intermediate, batch.tokens
        )

    def dense(self, batch: Batch) -> Block:
        """The feed-forward block of a layer without a router."""
        return self._matrices(
            "dense", self.model.matrices * self.model.hidden * self.model.dense_intermediate, batch.tokens
        )

    def merge(self, tokens: int) -> Block:
        """The keys and values of `tokens` cached tokens are read and written again, because their batch is another."""
        kernels = MERGE_KERNELS * self.model.layers
        busy = 2 * tokens * self.model.kv_bytes_per_token / self._bandwidth + kernels * self._op_latency_s
        return Block(1 if self.graph else kernels, picoseconds(busy))

    def head(self, batch: Batch) -> Block:
        """Final norm, LM head and arg-max of the sampled tokens."""
        operations = 2 * batch.outputs * self.model.vocabulary * self.model.hidden
        return self._block("head", self.model.head_bytes, operations)

    def copy_from(self, tier: int) -> int:
        """Picoseconds on the link for one expert that rests in `tier`. Raises ValueError where the link has no rate."""
        if self._unified and tier != NEAR:
            return 0
        return picoseconds(self.model.bytes_per_expert / self._copy_bandwidth(tier))

    def _copy_bandwidth(self, tier: int) -> float:
        """What is read from the SSD lies in a pinned buffer then. All links' copies read host memory once at least,
        but for those from near memory, which do not pass it."""
        if tier == NEAR:
            reads = self._unit().read_bandwidth
            return reads if self._unified else min(reads, self._h2d.bandwidth)
        rate = (self._h2d.pageable_bandwidth or 0.0) if tier == PAGEABLE else self._h2d.bandwidth
        if rate <= 0:
            raise ValueError("the link has no rate for pageable copies")
        return min(rate, self._host_bandwidth / self._devices)

    def taken(self, tier: int) -> float:
        """Bytes a second of the host's memory bandwidth that a copy from `tier` takes while it lasts.

        From the SSD they are written once and read once, at the pace of the slower of the two.
        """
        if self._unified or tier == NEAR:
            return 0.0
        if tier == SSD:
            return 2 * min(self._read_bandwidth, self._copy_bandwidth(SSD))
        return self._copy_bandwidth(tier) * (STAGED if tier == PAGEABLE else 1)

    def host_expert(self, tokens: int, beside: Iterable[Collection[int]] = (), tier: int = PINNED) -> int:
        """Picoseconds for one expert's `tokens` on the host's cores, which share its memory with the layer's copies.

        `beside`: for each link, the tiers from which it copies; the one that takes most counts. `tier`: where the
        expert rests.
        """
        rate = self._host_rate(beside)
        rate = min(rate, self._unit().read_bandwidth) if tier == NEAR else rate
        return picoseconds(max(self.model.bytes_per_expert / rate, tokens * self._host_token_s()))

    def host_prices(self, tier: int = PINNED) -> tuple[float, float, float]:
        """Seconds per expert on the host alone and beside one link's copies from `tier`, and per token."""
        alone, beside = (self.model.bytes_per_expert / self._host_rate(links) for links in ((), ((tier,),)))
        return alone, beside, self._host_token_s()

    def _host_rate(self, beside: Iterable[Collection[int]]) -> float:
        """Bytes per second that those copies leave the host's cores; see `host_expert`."""
        rate = self._host_bandwidth - fsum(max(map(self.taken, tiers), default=0.0) for tiers in beside)
        return max(rate, 0.1 * self._host_bandwidth)  # a link as fast as the memory does not stop the cores entirely

    def _host_token_s(self) -> float:
        return 2 * self.model.matrices * self.model.hidden * self.model.intermediate / self._host_flops

    def near_expert(self, tokens: int) -> int:
        """Picoseconds for one expert's `tokens` in the near-memory unit: few wait for bytes, many for operations."""
        return picoseconds(max(self._near_read_s(), tokens * self._near_token_s()))

    def near_activations(self, batch: Batch) -> tuple[int, int]:
        """Picoseconds that a layer's activations and the command take to the near-memory unit, and its results back.

        They pass the link and the unit's own interface as through a pipe: the narrower one counts. With one memory
        for host and device there is only the latter.
        """
        unit, size = self._unit(), batch.tokens * self.model.hidden * self._element
        if self._unified:
            return picoseconds(unit.alpha_s + size / unit.write_bandwidth), picoseconds(size / unit.read_bandwidth)
        there = unit.alpha_s + self._d2h.alpha_s + size / min(self._d2h.bandwidth, unit.write_bandwidth)
        return picoseconds(there), picoseconds(self._h2d.alpha_s + size / min(self._h2d.bandwidth, unit.read_bandwidth))

    def keep(self, experts: int) -> Block:
        """So many experts are copied from a buffer into slots, within device memory."""
        return self._block("keep", 2 * experts * self.model.bytes_per_expert, 0)

    def prices(self, tiers: NDArray[np.int8]) -> Prices:
        """What policies may know of these durations before a run; `tiers` [L * E] says where each expert rests."""
        copy = np.zeros(len(TIERS), np.int64)
        for tier in np.unique(tiers).tolist():
            copy[tier] = _nanoseconds(max(self.copy_from(tier), self.read_ps if tier == SSD else 0))
        shape, near = (len(self.model.moe_layers), self.model.experts), tiers == NEAR
        there_and_back, expert, token = [0, 0], 0, 0
        if near.any():
            batches = [Batch(tokens, 0, 0, 0) for tokens in (0, 1)]
            there_and_back = [sum(self.near_activations(batch)) + self.add(batch).device_ps for batch in batches]
            expert, token = picoseconds(self._near_read_s()), picoseconds(self._near_token_s())
        return Prices(
            copy[tiers].reshape(shape), _nanoseconds(self.copy_alpha_ps), near.reshape(shape),
            _nanoseconds(there_and_back[0]), _nanoseconds(there_and_back[1] - there_and_back[0]),
            _nanoseconds(expert), _nanoseconds(token), self._layer_prices(),
        )  # fmt: skip

    def _layer_prices(self) -> LayerPrices:
        one, model = Batch(1, 1, 1, 0), self.model
        blocks = [self.attention(one), self.router(one)] + [self.shared(one)] * (model.shared_intermediate > 0)
        weights = model.matrices * model.hidden * model.intermediate
        shared = model.matrices * model.hidden * model.shared_intermediate
        token = self.attention_prices()[2] + 2 * (model.experts * model.hidden + shared)
        return LayerPrices(
            _nanoseconds(sum(block.device_ps for block in blocks) + self.sync_ps + self.policy_ps),
            _nanoseconds(picoseconds(token / self._flops)),
            _nanoseconds(picoseconds(model.bytes_per_expert / self._bandwidth)),
            _nanoseconds(picoseconds(2 * weights / self._flops)),
            _nanoseconds(max(self.experts(0, 0).launches * self.issue_ps, self.experts(0, 0).device_ps)),
        )

    def _near_read_s(self) -> float:
        return self.model.bytes_per_expert / self._unit().internal_bandwidth

    def _near_token_s(self) -> float:
        return 2 * self.model.matrices * self.model.hidden * self.model.intermediate / self._unit().flops

    def _unit(self) -> NearMemory:
        if self._near is None:
            raise ValueError("the machine has no near-memory unit")
        return self._near

    def least_service_ps(self, on_host: bool, tiers: Collection[int] = (PINNED,), near: bool = False) -> int:
        """Time per miss at least, when the link and what may compute misses beside the device all work at once.

        `tiers`: where experts rest in this run; the fastest to copy from counts. `near`: the unit may serve misses.
        """
        times = [min(self.copy_from(tier) for tier in tiers)]
        if on_host:
            times.append(self.host_expert(1))
        if near and NEAR in tiers:
            times.append(self.near_expert(1))
        return int(1 / sum(Fraction(1, time) for time in times)) if all(times) else 0

    def expert_prices(self) -> tuple[float, float, float, float, float]:
        """What `block_ps` needs for one grouped launch: bytes per expert, operations per pair, the three rates."""
        weights = self.model.matrices * self.model.hidden * self.model.intermediate
        latency = KERNELS["experts"] * self._op_latency_s
        return float(self.model.bytes_per_expert), 2.0 * weights, self._bandwidth, self._flops, latency

    def activations(self, batch: Batch) -> tuple[int, int]:
        """Picoseconds that a layer's activations take to the host, and its results back."""
        size = 0.0 if self._unified else batch.tokens * self.model.hidden * self._element
        there = self._d2h.alpha_s + size / self._d2h.bandwidth
        return picoseconds(there), picoseconds(self._h2d.alpha_s + size / self._h2d.bandwidth)

    def peer(self, tokens: int) -> int:
        """Picoseconds that the hidden states of `tokens` take from one device to another."""
        size = tokens * self.model.hidden * self._element
        hops = (self._d2h, self._h2d) if self._peer is None else (self._peer,)
        return picoseconds(sum(hop.alpha_s + size / hop.bandwidth for hop in hops))

    def add(self, batch: Batch, results: int = 1) -> Block:
        """So many results from elsewhere are added to the device's own."""
        return self._block("add", (2 + results) * batch.tokens * self.model.hidden * self._element, 0)

    def low_bit_bytes(self, bits: int) -> int:
        """Bytes of one expert at `bits` bits a weight, never more than the whole."""
        return int(self.model.bytes_per_expert * min(bits, int(self._expert_bits)) // self._expert_bits)

    def low_bit_copy(self, bits: int, tier: int = PINNED) -> int:
        """Picoseconds on the link for one expert of few bits that rests in `tier`."""
        return int(self.copy_from(tier) * min(bits, int(self._expert_bits)) // self._expert_bits)

    def low_bit_read(self, bits: int) -> int:
        """Picoseconds that the SSD takes for one expert of few bits."""
        return self._read(self.low_bit_bytes(bits))

    def _read(self, size: int) -> int:
        """Whole blocks."""
        return picoseconds(-(-size // self._block_bytes) * self._block_bytes / self._read_bandwidth)

    def _experts(self, distinct: int, assignments: int) -> Block:
        """One grouped launch over `distinct` experts that serve `assignments` (token, expert) pairs."""
        weights = self.model.matrices * self.model.hidden * self.model.intermediate
        return self._block("experts", distinct * self.model.bytes_per_expert, 2 * assignments * weights)

    def _matrices(self, block: str, weights: int, tokens: int) -> Block:
        return self._block(block, weights * self._element, 2 * tokens * weights)

    def _block(self, block: str, traffic_bytes: float, operations: float) -> Block:
        kernels = KERNELS[block]
        busy = block_ps(
            float(traffic_bytes), float(operations), self._bandwidth, self._flops, kernels * self._op_latency_s
        )
        return Block(1 if self.graph else kernels, int(busy))
