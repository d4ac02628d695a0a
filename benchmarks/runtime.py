"""The live runtime against its peers on one machine in one run: tokens per second at equal expert bytes.

    python benchmarks/runtime.py                                        # the bundled tiny MoE
    python benchmarks/runtime.py --model mixtral-8x7b --shrink 4        # 5.9 GB of random weights on disk, minutes

Every side continues the same random prompts greedily with the same model, in turn, `--rounds` times; what is given are
medians, and ratios within rounds against the resident model. Before a side runs, the page cache lets go of its files;
how many bytes then really came from the disk is the kernel's own count (/proc/self/io). A side that can read its files
through the page cache may still find there what it has read before: put all sides into one memory cgroup
(`systemd-run --scope -p MemoryMax=2G ...`) where the model is to be larger than memory.

Sides: transformers with everything resident; moeflow with slots for a half and a quarter of the experts before all of
them in host memory, and with host memory for a quarter of them, slots included, before the checkpoint; accelerate with
the MoE layers on disk; moe-policylang's `attach` with as many experts. What cannot run here says why.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from moeflow.runtime.offload import Offload
from moeflow.runtime.random_model import random_model
from moeflow.traces.bundled import TINY_MOE

import moeflow

PROMPT = 16  # tokens


def main() -> None:
    arguments = _arguments()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    with contextlib.ExitStack() as stack:
        folder = TINY_MOE
        if arguments.model:
            place = tempfile.TemporaryDirectory(dir=arguments.folder)
            folder = Path(stack.enter_context(place))
            random_model(arguments.model, arguments.shrink).save_pretrained(folder)
        sides = _sides(folder, arguments.policy)
        rounds = [_round(sides, folder, arguments) for _ in range(arguments.rounds)]
    report = {name: _summary([each[name] for each in rounds], [each["resident"] for each in rounds]) for name in sides}
    if arguments.json:
        print(json.dumps(report, indent=2))
        return
    name = "tiny-moe" if not arguments.model else f"{arguments.model} / {arguments.shrink}, random weights"
    threads = f"{torch.get_num_threads()} thread{'s' if torch.get_num_threads() > 1 else ''}"
    print(
        f"{name}, {threads}, {arguments.prompts} prompts of {PROMPT} tokens, {arguments.tokens} new tokens each, ",
        end="",
    )
    print(f"{arguments.rounds} rounds; torch {torch.__version__}, transformers {transformers.__version__}\n")
    _print(report)


def _sides(folder: Path, policy: str) -> dict[str, Callable[[], Any]]:
    """Name -> a context that gives the model of that side."""
    row, experts = _sizes(folder)
    quarter = f"{(experts // 4) * row}B"
    return {
        "resident": lambda: _resident(folder),
        f"moeflow {policy}, 50 % in slots, all in RAM": lambda: _moeflow(folder, policy, 0.5, None),
        f"moeflow {policy}, 25 % in slots, all in RAM": lambda: _moeflow(folder, policy, 0.25, None),
        f"moeflow {policy}, 25 % in RAM, half of them slots, disk": lambda: _moeflow(folder, policy, 0.125, quarter),
        "accelerate, MoE layers on disk": lambda: _accelerate(folder),
        "moe-policylang attach lru, 25 %": lambda: _policylang(folder, experts),
    }


def _sizes(folder: Path) -> tuple[int, int]:
    """(bytes of a row, experts of the model)."""
    model = moeflow.offload(folder, "lru", 0.25)
    offload: Offload = model.__dict__["_moeflow"]
    found = offload.layout.size, len(offload.moe) * offload.spec.experts
    model.detach()
    return found


@contextlib.contextmanager
def _resident(folder: Path) -> Iterator[Any]:
    yield transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


@contextlib.contextmanager
def _moeflow(folder: Path, policy: str, budget: float, ram: str | None) -> Iterator[Any]:
    model = moeflow.offload(folder, policy, budget, ram=ram)
    yield model
    if ram is not None:
        model.__dict__["_moeflow"].source.close()


@contextlib.contextmanager
def _accelerate(folder: Path) -> Iterator[Any]:
    try:
        import accelerate  # noqa: F401
    except ImportError:
        raise Unavailable("accelerate is not installed") from None
    config = transformers.AutoConfig.from_pretrained(folder)
    layers = config.num_hidden_layers
    placed = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    placed |= {f"model.layers.{layer}": "disk" for layer in range(layers)}
    with tempfile.TemporaryDirectory(dir=folder.parent) as offloaded:
        load = transformers.AutoModelForCausalLM.from_pretrained
        try:
            model = load(folder, device_map=placed, offload_folder=offloaded).eval()
        except Exception as error:
            raise Unavailable(f"accelerate does not load it ({_reason(error)})") from None
        yield model


@contextlib.contextmanager
def _policylang(folder: Path, experts: int) -> Iterator[Any]:
    try:
        import moe_policylang
    except ImportError:
        raise Unavailable("moe-policylang is not installed") from None
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    try:
        moe_policylang.attach(model, f"policy lru {{ cache {{ capacity = {experts // 4}  eviction = lru }} }}")
        with torch.inference_mode():
            model(input_ids=torch.tensor([[1, 2]]))
    except Exception as error:
        raise Unavailable(f"attach does not run on this machine ({_reason(error)})") from None
    yield model


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or ['?'])[0]}"


class Unavailable(Exception):
    """Why a side cannot run here."""


def _round(sides: dict[str, Callable[[], Any]], folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """One run of every side, in turn."""
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 1000, (1, PROMPT), generator=generator) for _ in range(arguments.prompts)]
    found: dict[str, Any] = {}
    for name, side in sides.items():
        _forget_pages(folder)
        try:
            with side() as model:
                found[name] = _run(model, prompts, arguments.tokens)
        except Unavailable as reason:
            found[name] = {"unavailable": str(reason)}
        gc.collect()
    for values in found.values():
        if "made" in values:
            values["same"] = values["made"] == found["resident"]["made"]
    return found


def _run(model: Any, prompts: list[torch.Tensor], tokens: int) -> dict[str, Any]:
    """Continue every prompt on its own, after one that does not count."""
    how = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
    model.generate(prompts[0], max_new_tokens=2, do_sample=False, pad_token_id=0)
    offload = model.__dict__.get("_moeflow")
    before, moved = _bytes_read(), _moved(offload)
    began = time.perf_counter()
    made = [model.generate(prompt, **how)[0, PROMPT:].tolist() for prompt in prompts]
    seconds, rows = time.perf_counter() - began, len(prompts) * (PROMPT + tokens - 1)
    return {
        "tokens_per_s": len(prompts) * tokens / seconds,
        "read_per_token": (_bytes_read() - before) / rows,
        "copied_per_token": None if offload is None else (_moved(offload) - moved) / rows,
        "made": made,
    }


def _moved(offload: Offload | None) -> int:
    if offload is None:
        return 0
    moved = offload.statistics()["bytes"]
    return sum(moved[kind] for kind in ("demand", "stream", "prefetch", "padding"))


def _bytes_read() -> int:
    """Bytes that this process caused to be fetched from a disk."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("read_bytes")).split()[1])


def _forget_pages(folder: Path) -> None:
    for path in folder.glob("*.safetensors"):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def _summary(runs: list[dict[str, Any]], resident: list[dict[str, Any]]) -> dict[str, Any]:
    if "unavailable" in runs[0]:
        return runs[0]
    ratios = [run["tokens_per_s"] / other["tokens_per_s"] for run, other in zip(runs, resident, strict=True)]
    return {
        "tokens_per_s": statistics.median(run["tokens_per_s"] for run in runs),
        "pace": [statistics.median(ratios), min(ratios), max(ratios)],
        "read_per_token": statistics.median(run["read_per_token"] for run in runs),
        "copied_per_token": runs[-1]["copied_per_token"],
        "same_tokens": all(run["same"] for run in runs),
    }


def _print(report: dict[str, dict[str, Any]]) -> None:
    print("| side | tokens/s | against resident (range) | MB/token from disk | MB/token copied | same tokens |")
    print("|---|---|---|---|---|---|")
    for name, values in report.items():
        if "unavailable" in values:
            print(f"| {name} | {values['unavailable']} | | | | |")
            continue
        pace, least, most = values["pace"]
        copied = "-" if values["copied_per_token"] is None else f"{values['copied_per_token'] / 1e6:.3f}"
        print(
            f"| {name} | {values['tokens_per_s']:.2f} | {pace:.3f} ({least:.3f} to {most:.3f}) | "
            f"{values['read_per_token'] / 1e6:.3f} | {copied} | {'yes' if values['same_tokens'] else 'no'} |"
        )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="", help="a bundled spec: random weights of its shapes, saved to a folder")
    parser.add_argument("--shrink", type=int, default=1, help="divide every width of that model by this")
    parser.add_argument("--folder", default=None, help="where that model is saved; default: the temporary folder")
    parser.add_argument("--policy", default="lru")
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0: as many as it takes")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
