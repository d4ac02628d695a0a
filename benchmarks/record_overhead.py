"""What recording costs in decode: pairs of runs, with and without, alternating in one process.

    python benchmarks/record_overhead.py --device auto
    python benchmarks/record_overhead.py --device cuda --random --layers 24 --hidden 2048 --experts 64 --width 1024

Time is taken from the first to the last generated token, so neither loading nor the prompt counts; the device is
synchronised at these two points only. On a CPU that is shared with other work, `--typical` takes the median step
instead, which leaves out both the interference and the writing of a block every 4096 rows. The overhead is the median
over pairs of (time with / time without) - 1, given with its smallest and largest pair.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from moeflow.traces.generation import choose_device, load_model
from moeflow.traces.record_command import BUNDLED, device_name
from moeflow.traces.recorder import record_routing

MODES: dict[str, dict[str, Any]] = {
    "ids and weights": {},
    "+ full distribution": {"probs": True},
    "+ lookahead 4": {"lookahead": 4},
}


class DecodeClock(transformers.StoppingCriteria):
    """Never stops anything: notes when each token was there."""

    def __init__(self, tokens: int, device: torch.device) -> None:
        self.tokens, self.device = tokens, device
        self.marks: list[float] = []

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        if len(self.marks) in (0, self.tokens - 1) and self.device.type != "cpu":
            torch.accelerator.synchronize()
        self.marks.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    def seconds(self, typical: bool) -> float:
        """From the first to the last token; `typical`: as if every step took as long as the median one."""
        if not typical:
            return self.marks[-1] - self.marks[0]
        steps = [after - before for before, after in itertools.pairwise(self.marks)]
        return statistics.median(steps) * len(steps)


def main() -> None:
    arguments = _arguments()
    device = choose_device(arguments.device)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    model = _random_model(arguments, device) if arguments.random else load_model(arguments.model, device)[0]
    rows = {
        mode: _overhead(model, options, arguments)
        for mode, options in MODES.items()
        if options.get("lookahead", 0) <= model.config.get_text_config().num_hidden_layers
    }
    facts = {
        "device": device_name(device),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "time": "median step" if arguments.typical else "whole decode",
        "threads": torch.get_num_threads(),
        "model": "random" if arguments.random else Path(arguments.model).name,
        "batch": arguments.batch,
        "new_tokens": arguments.new_tokens,
        "pairs": arguments.pairs,
        "modes": rows,
    }
    print(json.dumps(facts, indent=2) if arguments.json else _table(facts))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(BUNDLED), help="folder or hub id; default: the bundled model")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, npu or xpu")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 = torch's own choice")
    parser.add_argument("--typical", action="store_true", help="time by the median step")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--random", action="store_true", help="random weights of the shape that follows")
    for name, default in (("layers", 16), ("hidden", 2048), ("experts", 64), ("top-k", 8), ("width", 1024)):
        parser.add_argument(f"--{name}", type=int, default=default)
    return parser.parse_args()


def _random_model(arguments: argparse.Namespace, device: torch.device) -> Any:
    """An OLMoE of that shape in bfloat16."""
    config = transformers.OlmoeConfig(
        hidden_size=arguments.hidden,
        intermediate_size=arguments.width,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.hidden // 128 or 1,
        num_key_value_heads=arguments.hidden // 128 or 1,
        num_experts=arguments.experts,
        num_experts_per_tok=arguments.top_k,
        dtype=torch.bfloat16,
    )
    with device:
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def _overhead(model: Any, options: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    plain, recorded = [], []
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "t.parquet"
        _decode_s(model, arguments)
        with record_routing(model, out, **options):
            _decode_s(model, arguments)
        for pair in range(arguments.pairs):
            for recording in (False, True) if pair % 2 == 0 else (True, False):
                if recording:
                    with record_routing(model, out, **options):
                        recorded.append(_decode_s(model, arguments))
                else:
                    plain.append(_decode_s(model, arguments))
    ratios = [with_it / without - 1 for with_it, without in zip(recorded, plain, strict=True)]
    tokens = arguments.batch * (arguments.new_tokens - 1)
    return {
        "plain_tokens_per_s": tokens / statistics.median(plain),
        "recorded_tokens_per_s": tokens / statistics.median(recorded),
        "overhead": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
    }


def _decode_s(model: Any, arguments: argparse.Namespace) -> float:
    """Seconds from the first to the last of the generated tokens."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(3, vocabulary, (arguments.batch, arguments.prompt_tokens), generator=generator)
    clock = DecodeClock(arguments.new_tokens, model.device)
    model.generate(
        input_ids=ids.to(model.device),
        attention_mask=torch.ones_like(ids).to(model.device),
        max_new_tokens=arguments.new_tokens,
        min_new_tokens=arguments.new_tokens,
        do_sample=False,
        stopping_criteria=transformers.StoppingCriteriaList([clock]),
    )
    return clock.seconds(arguments.typical)


def _table(facts: dict[str, Any]) -> str:
    lines = [
        f"{facts['model']} on {facts['device']}, torch {facts['torch']}, {facts['threads']} threads",
        f"batch {facts['batch']}, {facts['new_tokens']} tokens, {facts['pairs']} pairs, {facts['time']}",
        f"{'recorded':<22}{'plain tok/s':>12}{'with tok/s':>12}{'overhead':>10}{'min':>9}{'max':>9}",
    ]
    for mode, row in facts["modes"].items():
        spread = row["overhead"]
        lines.append(
            f"{mode:<22}{row['plain_tokens_per_s']:>12.1f}{row['recorded_tokens_per_s']:>12.1f}"
            f"{spread['median']:>10.1%}{spread['min']:>9.1%}{spread['max']:>9.1%}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
