"""llama.cpp: experts on the CPU, and an LRU cache of them on the GPU, over a fast and a slow link."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from figures import Anchor
from moeflow.hwprofiles.profile import Hardware
from moeflow.sim.cost import CostModel
from moeflow.sim.plan import make_plan
from moeflow.traces.model_spec import ModelSpec
from moeflow.traces.models import load_model_spec
from replays import HERE, Predicted, cache, cache_at_hit, host_layers, machine

MACHINES = ("epyc7742-4090", "epyc7742-5090", "desktop-egpu", "rtx4090", "rtx5090")
MODEL = str(HERE / "qwen3.8-flash-next.yaml")
# One bank for all layers; every miss is uploaded, whole, before the op runs.
LRU = {"cache": {"evict": "lru", "scope": "global"}, "miss": {"kind": "wait", "waves": "1", "chunks": 1}}
EGPU_CACHE = 8 * 10**9
LAUNCH_S = 4.5e-6  # kekzl/imp: 3091 launches took about 14 ms
DDR4 = 0.8 * 51.2e9  # bytes/s, two channels of DDR4-3200 at STREAM's share
INSTANT = {"memory_bandwidth": 1e15, "cpu_flops": 1e18}  # cores that take no time
ON_HOST = {"4090": 28, "5090": 25}  # of the 36 layers of gpt-oss-120b


def replay_x16(anchor: Anchor) -> dict[str, Predicted]:
    model, predicted = load_model_spec(MODEL), {}
    for card in ("4090", "5090"):
        hardware = machine(f"epyc7742-{card}")
        predicted[f"cpu-{card}"] = host_layers(hardware, model, len(model.moe_layers))
        predicted[f"largest-{card}"], predicted[f"largest-hit-{card}"] = cache(hardware, model, LRU)
        for size in ("cache", "bigger"):
            hit = anchor.figures[f"{size}-{card}"].hit
            assert hit is not None
            predicted[f"{size}-{card}"] = cache_at_hit(hardware, model, LRU, hit)
    return predicted


def replay_x4(anchor: Anchor) -> dict[str, Predicted]:
    model, hardware = load_model_spec(MODEL), machine("desktop-egpu")
    rate, _ = cache(hardware, model, LRU, EGPU_CACHE // model.bytes_per_expert)
    return {"cpu-x4": host_layers(hardware, model, len(model.moe_layers)), "cache-x4": rate}


def replay_ncmoe(anchor: Anchor) -> dict[str, Predicted]:
    model = load_model_spec("gpt-oss-120b")
    return {f"ncmoe-{card}": host_layers(machine(f"rtx{card}"), model, count) for card, count in ON_HOST.items()}


def replay_elsewhere(anchor: Anchor) -> dict[str, Predicted]:
    return dict.fromkeys(anchor.figures, Predicted.none("model and machine are not known to us"))


def why_x16(anchor: Anchor, predicted: Mapping[str, Predicted]) -> str:
    model, hardware, figures = load_model_spec(MODEL), machine("epyc7742-4090"), anchor.figures
    needs = len(model.moe_layers) * model.top_k
    on_cores = needs * CostModel(hardware, model).host_expert(1) / 1e9
    token, idle_cores = (1e3 / _rate(on_host) for on_host in (hardware, _with_host(hardware, **INSTANT)))
    published = 1e3 / figures["cpu-4090"].low
    quick = {card: _with_host(machine(f"epyc7742-{card}"), issue_s=LAUNCH_S) for card in ("4090", "5090")}
    hits = {card: figures[f"cache-{card}"].hit or 0.0 for card in quick}
    faster = {card: cache_at_hit(quick[card], model, LRU, hits[card]).value or 0.0 for card in quick}
    plan = make_plan(model, hardware).values
    titles = {row["way"]: f"{row['title']}, {row['tokens_per_s']:.0f} tok/s" for row in plan["rows"] if "hit" in row}
    return f"""\
**The sign is wrong, twice.** `sim plan` for the first machine would have named *{titles[plan["best"]]}* the best
way and
given the LRU cache {titles["lru"].rpartition(", ")[2]}; its owner gained {figures["gain-4090"].low - 1:.0%} by the
cache. The cache's own rate is predicted within 5 % on the 4090, a fifth to a quarter too low on the 5090. What is
wrong is
the CPU that it is compared with: {token:.1f} ms per token in the model, {published:.1f} in truth.

*The thread that issues kernels waits for the cores*, as in llama.cpp, whose issuing thread is one of those that
compute; only what it had issued before runs on. Were the cores infinitely fast, a token would take
{idle_cores:.1f} ms; their {on_cores:.1f} ms come on top but for {idle_cores + on_cores - token:.1f}. An earlier
version of the simulator let that thread run ahead, and erred by +154 % and +111 % where it now does by
{figures["cpu-4090"].error(1e3 / token):+.0%} and less.

*Expert kernels do not reach STREAM's bandwidth.* The profile has 164 GB/s. If the rest of the published token took as
long as in the model and nothing overlapped, {needs * model.bytes_per_expert / 1e9:.2f} GB of experts came at
{needs * model.bytes_per_expert / 1e6 / (published - idle_cores):.0f} GB/s. Two causes are likely, and the figures
do not
tell them apart: 64 threads that meet at a barrier after each small matrix product, and weights that lie unevenly on
the processor's memory nodes. The simulator has neither a fixed cost per operator on the cores
nor memory nodes, nor a share of host bandwidth that kernels reach, as it has for the device.

*Ten microseconds per launch are torch's, not a C++ engine's.* At the same hit rate the 5090 was a third faster
than the
4090; in the model both wait for the host, and differ by 4 %. 77 % hits leave {_link_ms(hardware, model, 0.77):.1f}
ms of
copies in the 5090's published {1e3 / figures["cache-5090"].low:.1f} ms, so everything else took at most
{1e3 / figures["cache-5090"].low - _link_ms(hardware, model, 0.77):.1f}: less than the model's launches alone. With
the
4.5 us that imp measured per launch the 5090's cache would be {faster["5090"]:.1f} tok/s
({figures["cache-5090"].error(faster["5090"]):+.0%}), the 4090's {faster["4090"]:.1f}
({figures["cache-4090"].error(faster["4090"]):+.0%}).
`sim plan` prices llama.cpp's rows with these launches.

*Hit rates* of the largest cache lie in the upper half of their intervals, the 5090's at the edge: the routing of this
model, or of what its user asked, is more local than the mean of recordings. If the cache was smaller than the card
allows, the more so."""


def why_x4(anchor: Anchor, predicted: Mapping[str, Predicted]) -> str:
    model = load_model_spec(MODEL)
    cost = CostModel(machine("desktop-egpu"), model)
    return f"""\
Sign and size are right, as far as a range of 1 to 8 can say: a missing expert takes {cost.copy_ps / 1e9:.1f} ms
over this
link and {cost.host_expert(1) / 1e9:.2f} on the host's cores. That the CPU's rate is met is no evidence, since
nobody
described the machine. Together with the table above: the model is right about a link that is hopeless, and wrong
about
one that is good, because it thinks too well of the CPU in a server."""


def why_ncmoe(anchor: Anchor, predicted: Mapping[str, Predicted]) -> str:
    model = load_model_spec("gpt-oss-120b")
    slow = _with_host(machine("rtx4090"), memory_bandwidth=DDR4)
    return f"""\
Both are predicted from the same 62 GB/s, the report says nothing of memory. An i5-13400F with two channels of
DDR4-3200
has 51.2 GB/s on its data sheet; at STREAM's 80 % the first prediction is
{host_layers(slow, model, ON_HOST["4090"]).value:.1f} tok/s, and the miss would be one of memory and not of the
model."""


def _rate(hardware: Hardware) -> float:
    model = load_model_spec(MODEL)
    return host_layers(hardware, model, len(model.moe_layers)).value or 0.0


def _with_host(hardware: Hardware, **numbers: float) -> Hardware:
    return replace(hardware, host=replace(hardware.host, **numbers))


def _link_ms(hardware: Hardware, model: ModelSpec, hit: float) -> float:
    """Milliseconds that a token's missing experts take on the link."""
    return (1 - hit) * len(model.moe_layers) * model.top_k * CostModel(hardware, model).copy_ps / 1e9


def why_elsewhere(anchor: Anchor, predicted: Mapping[str, Predicted]) -> str:
    return """\
Hit rates of 67 and 81 % at 64 and 128 experts per layer are those of a quarter and half of 256 experts, or of half
and
all of 128: without the model they say nothing. #24524's mode, hits on the GPU while the CPU computes misses, is
moeflow's
`miss: {kind: cpu}`, and can be replayed once the machine is known."""
