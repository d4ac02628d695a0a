"""How long each piece of work takes: the one place where bytes, operations and launches become time.

Every duration is an int64 number of picoseconds, so that engines only add and compare integers.
docs/model.md derives the formulas.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from ..hwprofiles.profile import Hardware
from ..policies.compiled import bare
from ..traces.model_spec import BITS, ModelSpec

PS_PER_SECOND = 10**12

# Kernels that one block issues in a tuned eager implementation. A 48-layer Qwen3-30B-A3B with offloaded experts
# was counted at 1,341 launches per token (kekzl/imp), 28 per layer; the split follows the operators of the block.
KERNELS = {
    "embed": 2, "attention": 16, "router": 5, "experts": 7, "shared": 5, "dense": 5, "gates": 2, "head": 4, "add": 1,
}  # fmt: skip
MERGE_KERNELS = 2  # per layer: keys and values are gathered into their new batch


def picoseconds(seconds: float) -> int:
    """Rounded to the nearest picosecond."""
    return round(seconds * PS_PER_SECOND)


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

    def __init__(self, hardware: Hardware, model: ModelSpec, pageable: bool = False, devices: int = 1) -> None:
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
        bandwidth = (link.h2d.pageable_bandwidth or 0.0) if pageable else link.h2d.bandwidth
        if bandwidth <= 0:
            raise ValueError(f"link {link.name} has no rate for {'pageable' if pageable else 'pinned'} copies")
        bandwidth = min(bandwidth, host.memory_bandwidth / devices)  # read once, by all links
        self.copy_ps = 0 if device.unified_memory else picoseconds(model.bytes_per_expert / bandwidth)
        storage = hardware.storage
        rate = min(storage.read_bandwidth, storage.queue_depth * storage.block_bytes / storage.latency_s)
        blocks = -(-model.bytes_per_expert // storage.block_bytes)
        self.read_alpha_ps = picoseconds(storage.latency_s)
        self.read_ps = picoseconds(blocks * storage.block_bytes / rate)
        self._element = BITS[model.dtype] / 8
        self._expert_bits = BITS[model.expert_dtype or model.dtype]
        self._host_bandwidth, self._host_flops = host.memory_bandwidth, host.cpu_flops
        self._copy_bandwidth = bandwidth
        self._d2h, self._h2d, self._unified = link.d2h, link.h2d, device.unified_memory
        self._peer = link.peer
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

    def host_expert(self, tokens: int, links: int) -> int:
        """Picoseconds for one expert's `tokens` on the host's cores, beside copies over so many links."""
        _, _, per_token = self.host_prices()
        return picoseconds(max(self.model.bytes_per_expert / self._host_rate(links), tokens * per_token))

    def _host_rate(self, links: int) -> float:
        """Bytes per second that copies over so many links leave the host's cores, which share its memory with them."""
        rate = self._host_bandwidth - (0.0 if self._unified else links * self._copy_bandwidth)
        return max(rate, 0.1 * self._host_bandwidth)  # a link as fast as the memory does not stop the cores entirely

    def least_service_ps(self, on_host: bool) -> int:
        """Link time per miss at least, or, shared with the host's cores at their fastest, time per miss."""
        host = self.host_expert(1, 0)
        return self.copy_ps * host // max(1, self.copy_ps + host) if on_host else self.copy_ps

    def expert_prices(self) -> tuple[float, float, float, float, float]:
        """What `block_ps` needs for one grouped launch: bytes per expert, operations per pair, the three rates."""
        weights = self.model.matrices * self.model.hidden * self.model.intermediate
        latency = KERNELS["experts"] * self._op_latency_s
        return float(self.model.bytes_per_expert), 2.0 * weights, self._bandwidth, self._flops, latency

    def host_prices(self) -> tuple[float, float, float]:
        """Seconds per expert on the host alone and beside one link's copies, and per token: see `host_expert`."""
        weights = self.model.matrices * self.model.hidden * self.model.intermediate
        alone, beside = (self.model.bytes_per_expert / self._host_rate(links) for links in (0, 1))
        return alone, beside, 2 * weights / self._host_flops

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

    def low_bit(self, bits: int) -> tuple[int, int]:
        """(picoseconds, bytes) of one expert's copy at `bits` bits a weight, never more than the whole copy."""
        bits = min(bits, int(self._expert_bits))
        return int(self.copy_ps * bits // self._expert_bits), int(
            self.model.bytes_per_expert * bits // self._expert_bits
        )

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
