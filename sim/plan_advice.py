"""What a plan's figures mean: whether offloading helps and why, how far the limit is, and which settings say so."""

from __future__ import annotations

import re
import shlex
from typing import Any

from .cost import CostModel, seconds
from .plan import CACHES, GIB, HOPELESS, Box, Plan

KT_METHODS = {"bfloat16": "BF16", "float8": "FP8", "mxfp4": "MXFP4"}  # kt-kernel's native formats


def advice(plan: Plan) -> list[str]:
    """Sentences, the verdict first."""
    box, best = plan.box, plan.row(plan.values["best"])
    if best["way"] == "resident":
        return [
            f"Offloading is not needed: all {box.model.routed_bytes / GIB:.1f} GiB of experts fit beside "
            f"{box.fixed_bytes / GIB:.1f} GiB of dense weights, workspace and KV cache "
            f"in {box.hardware.device.memory_bytes / GIB:.1f} GiB."
        ]
    said = [_ssd(plan)] if plan.values["memory"]["on_ssd"] else []
    said.insert(0, _verdict(plan, best))
    said.append(_limit(plan, best))
    if plan.values["routing"]["kind"] == "surrogate":
        said.append(
            "Routing is surrogate: made up to be as local as recorded models are. It has no lasting favourites and no "
            "pattern across layers, which moeflow's cache needs to beat LRU: record your own with `trace record`, then "
            "give --trace."
        )
    return said


def _limit(plan: Plan, best: dict[str, Any]) -> str:
    resident, bound = plan.values["resident_tokens_per_s"], best["bound_tokens_per_s"]
    above = f"with every expert in device memory it would be {resident:.1f} tokens/s"
    if bound is None or bound >= resident:  # where the host computes, the bound spares the device all experts
        link = plan.row("lru").get("bound_tokens_per_s")
        alone = "" if link is None else f" Over the link alone no exact policy exceeds {link:.1f} on this routing."
        return f"The limit: {above}; {best['title']}: {best['tokens_per_s'] / resident:.0%} of that.{alone}"
    return (
        f"The limit: no exact policy with this link and these slots exceeds {bound:.1f} tokens/s on this routing; "
        f"{best['title']}: {best['tokens_per_s'] / bound:.0%} of that. And {above}."
    )


def _verdict(plan: Plan, best: dict[str, Any]) -> str:
    if best["tokens_per_s"] < HOPELESS:
        return f"Hopeless: the best way ({best['title']}) yields {best['tokens_per_s']:.2f} tokens/s."
    caches = [row for row in plan.values["rows"] if row["way"] in CACHES and row["refused"] is None]
    cpu = plan.row("cpu")
    if best["way"] not in CACHES or not caches:
        rival = max(caches, key=lambda row: row["tokens_per_s"], default=None)
        beaten = "" if rival is None else f"; the best cache ({rival['title']}): {_rate(rival)}"
        sure = rival is None or rival["interval"] is None or rival["interval"][1] < best["tokens_per_s"]
        return (
            f"{'An expert cache will not help' if sure else 'An expert cache probably does not help'}: "
            f"{best['title']}: {_rate(best)}{beaten}. {_why(plan.box)}"
        )
    if cpu["refused"] is not None:
        return f"An expert cache is what works: {best['title']}: {_rate(best)}."
    gain = best["tokens_per_s"] / cpu["tokens_per_s"]
    sure = best["interval"] is not None and best["interval"][0] > cpu["tokens_per_s"]
    return (
        f"{'Yes' if sure else 'Probably, if your routing is local enough'}: {best['title']}: {_rate(best)}, "
        f"{gain:.2f} times the {cpu['tokens_per_s']:.1f} of leaving experts to the CPU. {_why(plan.box)}"
    )


def _rate(row: dict[str, Any]) -> str:
    low, high = row["interval"] or (row["tokens_per_s"], row["tokens_per_s"])
    between = f" [{low:.1f} to {high:.1f}]" if f"{low:.1f}" != f"{high:.1f}" else ""
    return f"{row['tokens_per_s']:.1f} tokens/s{between}"


def _why(box: Box) -> str:
    cost = CostModel(box.hardware, box.model)
    copy, host = seconds(cost.copy_ps) * 1e3, seconds(cost.host_expert(1)) * 1e3
    return f"A miss costs {copy:.2f} ms over {box.hardware.link.name} and {host:.2f} ms on the host's cores."


def _ssd(plan: Plan) -> str:
    memory, box = plan.values["memory"], plan.box
    read = seconds(CostModel(box.hardware, box.model).read_ps) * 1e3
    return (
        f"Host memory is too small: {memory['on_ssd']} of {memory['experts']} experts "
        f"({memory['on_ssd'] * memory['bytes_per_expert'] / GIB:.1f} GiB) rest on {box.hardware.storage.name}, where "
        f"each read takes {read:.1f} ms."
    )


def settings(plan: Plan) -> dict[str, Any]:
    """Numbers that the runtimes' options take, and `moeflow`: the preset to run."""
    box, model = plan.box, plan.box.model
    on_host = len(model.moe_layers) - box.slots // model.experts
    cpu, lru = plan.row("cpu"), plan.row("lru")
    cached = lru["refused"] is None and (cpu["refused"] is not None or lru["tokens_per_s"] > cpu["tokens_per_s"])
    ways = [row for row in plan.values["rows"] if row["way"] in CACHES and row["refused"] is None]
    preset = "cpu" if plan.values["best"] == "cpu" else max(ways, key=_quick)["way"] if ways else "moeflow"
    if preset == "lru" and plan.values["routing"]["kind"] == "surrogate":
        preset = "moeflow"  # surrogate routing holds nothing that it could learn; recordings do (docs/policies.md)
    return {
        "llama_layers_on_cpu": model.moe_layers[on_host - 1] + 1 if on_host else 0,
        "llama_cache_mib": box.slots * model.bytes_per_expert // 2**20 if cached else 0,
        "kt_experts_per_layer": box.slots // len(model.moe_layers),
        "kt_method": KT_METHODS.get(model.expert_dtype or model.dtype, "BF16"),
        "moeflow": preset,
    }


def _quick(row: dict[str, Any]) -> float:
    return float(row["tokens_per_s"])


def llama_options(plan: Plan) -> list[str]:
    """llama.cpp's: everything on the device but experts, which lie in the first layers or behind its LRU cache."""
    chosen, context = settings(plan), str(plan.box.context)
    options = ["-ngl", "99", "-c", context]
    if chosen["llama_cache_mib"]:
        return [*options, "-cmoe", "--moe-cache-mib", str(chosen["llama_cache_mib"])]
    if chosen["llama_layers_on_cpu"]:
        return [*options, "-ncmoe", str(chosen["llama_layers_on_cpu"])]
    return options


def llama_override(plan: Plan) -> list[str]:
    """The same placement as tensor overrides, for builds that know no `-ncmoe`; empty where all is resident."""
    layers = range(settings(plan)["llama_layers_on_cpu"])
    if not layers:
        return []
    return ["-ot", rf"blk\.({'|'.join(map(str, layers))})\.ffn_(up|down|gate)_exps=CPU"]


def ktransformers_options(plan: Plan) -> list[str]:
    """kt-kernel's, for `python -m sglang.launch_server`; the model's folder and the cores come from the machine."""
    chosen = settings(plan)
    return [
        "--context-length", str(plan.box.context),
        "--kt-method", chosen["kt_method"],
        "--kt-num-gpu-experts", str(chosen["kt_experts_per_layer"]),
        "--kt-expert-placement-strategy", "uniform",
    ]  # fmt: skip


def moeflow_command(plan: Plan, asked: dict[str, str | None], policy: str) -> str:
    """The run that replays a recording with the plan's settings; `asked` are --hw, --vram, ... as they were given."""
    words = ["sim", "run"]
    for option, value in asked.items():
        words += [] if value is None else [option, value]
    return " ".join(map(shlex.quote, [*words, "--max-context", str(plan.box.context), "--policy", policy]))


def comment(text: str) -> str:
    """One printable line: names come from other people's files."""
    return re.sub(r"[^ -~]+", " ", text)
