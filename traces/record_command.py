"""`trace record`: run prompts through a model and keep what its routers decided."""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import InputError

if TYPE_CHECKING:
    import torch

    from .generation import Sampling
    from .recorder import Recording

BUNDLED = Path(__file__).parent / "tiny_moe"
BUNDLED_PROMPTS = BUNDLED / "prompts.jsonl"
BUNDLED_LICENCE = "Apache-2.0"


def record(
    model: Annotated[str, typer.Argument(help="Hugging Face model id or folder; default: the bundled model.")] = "",
    prompts: Annotated[
        str, typer.Option(help="Text file (a prompt per line), JSONL (prompt, domain) or - for stdin.")
    ] = "",
    out: Annotated[Path, typer.Option("--out", "-o", help="The trace to write.")] = Path("trace.parquet"),
    limit: Annotated[int, typer.Option(help="Only the first N prompts; 0 = all.", min=0)] = 0,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate per prompt.", min=1)] = 64,
    max_prompt_tokens: Annotated[int, typer.Option(help="Keep the first N tokens of a prompt; 0 = all.", min=0)] = 0,
    batch_size: Annotated[int, typer.Option(help="Prompts that run together.", min=1)] = 8,
    temperature: Annotated[float, typer.Option(help="0 = greedy.", min=0.0)] = 0.0,
    top_p: Annotated[float, typer.Option(help="Nucleus of the sampling.", min=0.0, max=1.0)] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    chat: Annotated[bool, typer.Option("--chat", help="Put prompts into the tokenizer's chat template.")] = False,
    lookahead: Annotated[
        int, typer.Option(help="Also what the gates of the next D MoE layers choose; 0 = none.", min=0)
    ] = 0,
    lookahead_width: Annotated[
        int, typer.Option(help="Experts per lookahead choice; 0 = the model's top-k.", min=0)
    ] = 0,
    lookahead_weights: Annotated[bool, typer.Option(help="With the probabilities of the lookahead choices.")] = True,
    probs: Annotated[bool, typer.Option("--probs", help="Also the full router distribution.")] = False,
    timing: Annotated[bool, typer.Option("--timing", help="Also when each forward pass began and ended.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, npu or xpu.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, bfloat16, float16 or float32.")] = "auto",
    experts_implementation: Annotated[
        str, typer.Option(help="eager, grouped_mm or batched_mm; default: transformers' own choice.")
    ] = "",
    revision: Annotated[str, typer.Option(help="Of a model on the hub.")] = "",
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing trace.")] = False,
) -> None:
    """Record the routing of a MoE model while it continues prompts. Without arguments: the bundled model."""
    _check_choices(device, dtype)
    _check_out(out, force)
    prompts = prompts or str(BUNDLED_PROMPTS)
    _prepare_transformers()
    from .generation import Sampling, check_context, choose_device, encode, generate_recorded, load_model, read_prompts
    from .recorder import Recorded, Recording
    from .writer import TraceWriter

    texts = read_prompts(prompts, limit or None)
    sampling = Sampling(max_new_tokens, temperature, top_p, seed)
    loaded, tokenizer = load_model(
        model or str(BUNDLED),
        choose_device(device),
        dtype=dtype,
        experts_implementation=experts_implementation or None,
        revision=revision or None,
        trust_remote_code=trust_remote_code,
    )
    options = Recorded(
        lookahead=lookahead,
        width=lookahead_width,
        lookahead_weights=lookahead_weights,
        probs=probs,
        timing=timing,
    )
    recording = Recording(loaded, options, name=_model_name(model))
    encoded = encode(tokenizer, texts, chat)
    cut = [ids[: max_prompt_tokens or None] for ids in encoded]
    check_context(loaded, cut, max_new_tokens)
    truncated = sum(len(short) < len(full) for short, full in zip(cut, encoded, strict=True))
    source = {
        "source": "bundled" if prompts == str(BUNDLED_PROMPTS) else "stdin" if prompts == "-" else Path(prompts).name,
        "count": len(texts),
        "sha256": hashlib.sha256("\n".join(prompt.text for prompt in texts).encode()).hexdigest(),
        "chat_template": chat,
        "max_tokens": max_prompt_tokens or None,
        "truncated": truncated,
    }
    facts = describe(loaded, _model_name(model), sampling, source, batch_size)
    begin = time.perf_counter()
    with TraceWriter(out, recording.meta(licence_of(model) if model else BUNDLED_LICENCE)) as writer:
        with recording.into(writer), _progress(len(cut)) as report:
            generate_recorded(loaded, recording, texts, cut, sampling, batch_size, report)
        writer.finish(requests=recording.requests(), recorded=facts)
    _summary(out, recording, facts, time.perf_counter() - begin, truncated)


def _check_choices(device: str, dtype: str) -> None:
    for option, value, known in (
        ("--device", device.partition(":")[0], ("auto", "cpu", "cuda", "npu", "xpu")),
        ("--dtype", dtype, ("auto", "bfloat16", "float16", "float32")),
    ):
        if value not in known:
            raise InputError(f"{option} {value!r} is unknown; use one of {', '.join(known)}")


def _check_out(out: Path, force: bool) -> None:
    if out.is_dir() or not out.parent.is_dir():
        raise InputError(f"--out {out}: {'is a folder' if out.is_dir() else 'its folder does not exist'}; name a file")
    if out.exists() and not force:
        raise InputError(f"{out} exists already; name another file with --out, or use --force to overwrite it")


def _prepare_transformers() -> None:
    try:
        import torch  # noqa: F401
        from transformers.utils import logging
    except ImportError as error:
        raise InputError(f"recording needs {error.name}: pip install 'moeflow[live]'") from None
    if not sys.stderr.isatty():
        logging.disable_progress_bar()


def _model_name(model: str) -> str:
    return Path(model).name if model else "tiny-moe"


def licence_of(model: str) -> str:
    """The licence that the model's card (README.md) names, or nothing."""
    from transformers.utils.hub import cached_file

    try:
        card = cached_file(
            model,
            "README.md",
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_connection_errors=False,
        )
    except (OSError, ValueError):
        return ""
    lines = Path(card).read_text(encoding="utf-8", errors="replace").splitlines() if card else []
    header = lines[1 : lines.index("---", 1)] if lines[:1] == ["---"] and "---" in lines[1:] else []
    return next((line.partition(":")[2].strip() for line in header if line.startswith("license:")), "")


def describe(model: Any, name: str, sampling: Sampling, prompts: dict[str, Any], batch_size: int) -> dict[str, Any]:
    """How a recording was made, for the trace's metadata: no paths, no times."""
    from importlib.metadata import version

    import torch
    import transformers

    return {
        "by": f"moeflow {version('moeflow')} trace record",
        "model": name,
        "revision": getattr(model.config, "_commit_hash", None),
        "device": device_name(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "software": {"torch": torch.__version__, "transformers": transformers.__version__},
        "attention_implementation": getattr(model.config, "_attn_implementation", None),
        "experts_implementation": getattr(model.config.get_text_config(), "_experts_implementation", None),
        "prompts": prompts,
        "batch_size": batch_size,
        "sampling": {
            "max_new_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": sampling.seed if sampling.temperature else None,
        },
    }


def device_name(device: torch.device) -> str:
    """The device's type and, where the backend tells, its product name."""
    import torch

    backend = getattr(torch, device.type, None)
    if device.type == "cpu" or not hasattr(backend, "get_device_name"):
        return device.type
    return f"{device.type}: {backend.get_device_name(device)}"  # type: ignore[union-attr]


@contextmanager
def _progress(total: int) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal; elsewhere a line for every tenth of the prompts."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("recording"), BarColumn(), MofNCompleteColumn(), TextColumn("prompts"))
        with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bar:
            task = bar.add_task("recording", total=total)
            yield lambda done: bar.update(task, completed=done)
        return
    shown = 0

    def line(done: int) -> None:
        nonlocal shown
        if done * 10 // total > shown:
            shown = done * 10 // total
            print(f"recorded {done} of {total} prompts", file=sys.stderr, flush=True)

    yield line


def _summary(out: Path, recording: Recording, facts: dict[str, Any], seconds: float, truncated: int) -> None:
    size = out.stat().st_size
    print(f"{out}: {recording.rows} rows in {recording.steps} steps, {len(recording.requests())} requests")
    print(f"{recording.spec.name} on {facts['device']}: {recording.rows / seconds:.0f} tokens/s while recording")
    print(f"{size / 1e6:.1f} MB, {size / recording.rows:.0f} bytes per row")
    if truncated:
        print(f"{truncated} prompts were cut to {facts['prompts']['max_tokens']} tokens")
