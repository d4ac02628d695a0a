"""Train the tiny MoE on the CPU; resumable, with a schedule that follows the clock and not the step count.

    python -m moeflow.traces.tiny_moe.train WORK --hours 1.5     # or --until 14:30; run again to resume
    python -m moeflow.traces.tiny_moe.train WORK --export        # newest checkpoint -> model files beside this script

WORK holds what `corpus.py` and `tokenizer.py` wrote; checkpoints and the loss curve go there too. With glibc,
MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=8589934592 in the environment saves page faults.
"""

import argparse
import copy
import csv
import datetime
import math
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import OlmoeForCausalLM

from . import model as tiny

HERE = Path(__file__).parent
SHARE = {"prose": 0.30, "dialogue": 0.12, "docs": 0.29, "code": 0.29}  # of the training windows
LENGTH, BATCH = 512, 4  # tokens per window, windows per step
PEAK_RATE, WARM_UP_STEPS, DECAY = 3e-3, 100, 0.1  # AdamW
BALANCE, Z = 0.01, 0.001  # weights of the router losses (each summed over layers)
CHECKPOINT_S, EVALUATE_S = 180, 300  # seconds
COLUMNS = ("step", "tokens", "seconds", "rate", "loss", "balance", "z", *(f"heldout_{kind}" for kind in tiny.KINDS))


class Windows:
    """Random training windows: a kind drawn by `SHARE`, then a place in it."""

    def __init__(self, work: Path) -> None:
        self.ids = tiny.load_ids(work, "train")
        self.random = np.random.default_rng(0)

    def batch(self) -> torch.Tensor:
        """[BATCH, LENGTH] token ids, each row beginning with `<|bos|>`."""
        rows = np.full((BATCH, LENGTH), tiny.BOS, dtype=np.int64)
        for row in rows:
            ids = self.ids[self.random.choice(tiny.KINDS, p=[SHARE[kind] for kind in tiny.KINDS])]
            start = self.random.integers(len(ids) - LENGTH + 1)
            row[1:] = ids[start : start + LENGTH - 1]
        return torch.from_numpy(rows)


def seconds_until(clock: str) -> float:
    """Seconds from now to the next HH:MM, local time."""
    now = datetime.datetime.now()
    hour, minute = map(int, clock.split(":"))
    end = now.replace(hour=hour, minute=minute, second=0, microsecond=0)
    return ((end - now).total_seconds()) % 86_400


def learning_rate(step: int, progress: float) -> float:
    """Linear warm-up by steps, then linear to zero by the fraction of training time that has passed."""
    return PEAK_RATE * min(1.0, (step + 1) / WARM_UP_STEPS) * max(0.0, 1.0 - progress)


def optimizer_for(model: torch.nn.Module) -> torch.optim.AdamW:
    """AdamW; weight decay on matrices only, not on norms or the router."""
    named = list(model.named_parameters())
    plain = [p for name, p in named if p.ndim < 2 or "gate.weight" in name]
    decayed = [p for name, p in named if p.ndim >= 2 and "gate.weight" not in name]
    groups = [{"params": decayed, "weight_decay": DECAY}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.95), fused=True)


def replica(model: OlmoeForCausalLM) -> OlmoeForCausalLM:
    """A copy whose weights are the model's own memory; gradients are its own."""
    twin = copy.deepcopy(model)
    for mine, theirs in zip(twin.parameters(), model.parameters(), strict=True):
        mine.data = theirs.data
    return twin


class Training:
    """Everything that a checkpoint holds, and one step of it.

    Each worker thread runs forward and backward for its share of the windows on a replica that shares the weights but
    not the gradients. One torch thread per worker wastes far less than two torch threads in every small product when
    the machine is shared.
    """

    def __init__(self, work: Path, workers: int) -> None:
        torch.manual_seed(0)
        self.work = work
        self.model = tiny.fresh()
        self.replicas = [self.model] + [replica(self.model) for _ in range(workers - 1)]
        self.routers = [tiny.RouterLosses(model) for model in self.replicas]
        self.pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
        self.optimizer = optimizer_for(self.model)
        self.windows = Windows(work)
        self.heldout = {
            kind: tiny.heldout_windows(ids, LENGTH, 6) for kind, ids in tiny.load_ids(work, "heldout").items()
        }
        self.steps, self.seconds = 0, 0.0
        self.curve: list[list[int | str]] = []
        if (work / "checkpoint.pt").exists():
            self.resume()

    def resume(self) -> None:
        """Continue from the newest checkpoint."""
        saved = torch.load(self.work / "checkpoint.pt", weights_only=False)
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.windows.random.bit_generator.state = saved["random"]
        self.steps, self.seconds, self.curve = saved["steps"], saved["seconds"], saved["curve"]
        print(f"resumed at step {self.steps}", flush=True)

    def save(self) -> None:
        """Write checkpoint and loss curve, each under a temporary name first."""
        saved = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "steps": self.steps,
            "random": self.windows.random.bit_generator.state,
            "seconds": self.seconds,
            "curve": self.curve,
        }
        torch.save(saved, self.work / "checkpoint.tmp")
        (self.work / "checkpoint.tmp").replace(self.work / "checkpoint.pt")
        with (self.work / "loss_curve.tmp").open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([COLUMNS, *self.curve])
        (self.work / "loss_curve.tmp").replace(self.work / "loss_curve.csv")

    def step(self, rate: float) -> np.ndarray:
        """One optimiser step; returns cross-entropy, balance and z-loss (balance and z as means over layers)."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        parts = self.windows.batch().chunk(len(self.replicas))
        means = list(self.pool.map(self.gradients, self.replicas, self.routers, parts))
        for model in self.replicas[1:]:
            for mine, theirs in zip(self.model.parameters(), model.parameters(), strict=True):
                mine.grad.add_(theirs.grad)
                theirs.grad = None
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps += 1
        return np.mean(means, axis=0)

    def gradients(self, model: OlmoeForCausalLM, routers: tiny.RouterLosses, ids: torch.Tensor) -> list[float]:
        """Forward and backward for one worker's windows; returns cross-entropy, balance and z-loss."""
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
            logits = model.lm_head(hidden[:, :-1])
        loss = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())
        balance, z = routers.take()
        ((loss + BALANCE * balance + Z * z) / len(self.replicas)).backward()
        return [loss.item(), balance.item() / tiny.LAYERS, z.item() / tiny.LAYERS]

    def evaluate(self) -> list[float]:
        """Held-out cross-entropy in nats by kind, on a few windows."""
        losses = [tiny.mean_loss(self.model, windows) for windows in self.heldout.values()]
        self.routers[0].seen.clear()
        return losses

    def run(self, budget: float) -> None:
        """Train until `budget` seconds of training time (those before a resume included) have passed."""
        origin = time.monotonic() - self.seconds
        saved = evaluated = self.seconds
        recent: list[np.ndarray] = []
        while (spent := time.monotonic() - origin) < budget - 20:  # the rest is for the last evaluation
            rate = learning_rate(self.steps, spent / (budget - 20))
            recent.append(self.step(rate))
            self.seconds = time.monotonic() - origin
            due = self.seconds - evaluated > EVALUATE_S
            if due or self.steps % 10 == 0:
                self.report(rate, np.mean(recent, axis=0), self.evaluate() if due else [math.nan] * len(tiny.KINDS))
                recent, evaluated = [], self.seconds if due else evaluated
            if self.seconds - saved > CHECKPOINT_S:
                self.save()
                saved = self.seconds
        self.report(0.0, np.mean(recent or [np.full(3, math.nan)], axis=0), self.evaluate())
        self.save()

    def report(self, rate: float, means: np.ndarray, heldout: list[float]) -> None:
        """Add one row to the curve and print it."""
        tokens = self.steps * BATCH * LENGTH
        shown = ["" if math.isnan(x) else f"{x:.4f}" for x in (*means, *heldout)]
        self.curve.append([self.steps, tokens, f"{self.seconds:.0f}", f"{rate:.3g}", *shown])
        speed = f"{self.seconds:.0f} s {tokens / self.seconds:.0f} tok/s rate {rate:.2e}"
        losses = f"loss {shown[0]} balance {shown[1]} z {shown[2]} heldout {shown[3:]}"
        print(f"step {self.steps} tokens {tokens:,} {speed} {losses}", flush=True)


def export(work: Path) -> None:
    """Write the newest checkpoint beside this script as a bfloat16 transformers model, with its loss curve."""
    model = tiny.fresh()
    model.load_state_dict(torch.load(work / "checkpoint.pt", weights_only=False)["model"])
    model.to(torch.bfloat16).save_pretrained(HERE)
    (HERE / "model.safetensors").chmod(0o644)
    shutil.copyfile(work / "loss_curve.csv", HERE / "loss_curve.csv")
    shutil.copyfile(work / "sources.json", HERE / "sources.json")
    print(f"exported to {HERE}", flush=True)


def main() -> None:
    """Train, or export what was trained."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder with the encoded corpus")
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--hours", type=float, help="training time in total, over all resumed runs")
    length.add_argument("--until", metavar="HH:MM", help="wall-clock time at which training ends")
    length.add_argument("--export", action="store_true", help="write the model files and stop")
    parser.add_argument("--workers", type=int, default=2, help="threads that share the windows of a step")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if not args.export:
        training = Training(args.work, args.workers)
        training.run(args.hours * 3600 if args.hours else training.seconds + seconds_until(args.until))
    export(args.work)


if __name__ == "__main__":
    main()
