"""A checkpoint's model with everything but its experts in memory: those stay on the meta device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from ..errors import InputError
from ..traces.routers import MoeLayer
from .layout import expert_weights

FORMATS_TO_COME = {"fp8": "block FP8", "mxfp4": "MXFP4"}


def checkpoint_folder(reference: str | Path) -> Path:
    """A folder with a checkpoint, or a model's id on the hub, which is then downloaded. Raises InputError."""
    path = Path(reference)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError(f"{path}: no config.json there; give a folder with a checkpoint")
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(str(reference), allow_patterns=["*.safetensors", "*.json", "*.model", "*.txt"]))
    except (HFValidationError, RepositoryNotFoundError, LocalEntryNotFoundError, OSError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{str(reference)!r}: neither a folder nor a model that can be downloaded ({first})") from None


def skeleton_of(folder: Path) -> Any:
    """The whole model on the meta device. Raises InputError for a number format that does not move as it is."""
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        first = (str(error).splitlines() or ["?"])[0]
        raise InputError(f"{folder}: transformers does not know this model ({first})") from None
    refuse_quantised(config, str(folder))
    named = (config.architectures or [""])[0]
    kind = getattr(transformers, named, None)
    if kind is None:
        raise InputError(f"{folder}: config.json names no architecture that transformers has ({named or 'none'})")
    with torch.device("meta"):
        model = kind._from_config(config) if config.dtype is None else kind._from_config(config, dtype=config.dtype)
    return model.eval()


def refuse_quantised(config: Any, where: str) -> None:
    """Raises InputError, naming the number format, for a checkpoint that was quantised."""
    quantised = getattr(config, "quantization_config", None)
    if quantised:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised.quant_method
        method = str(getattr(method, "value", method))
        raise InputError(
            f"{where}: a checkpoint in {FORMATS_TO_COME.get(method, method)} cannot be offloaded yet; "
            "give one in bfloat16, float16 or float32"
        )


def load_bare(folder: Path, skeleton: Any, layers: tuple[MoeLayer, ...], device: torch.device) -> Any:
    """The model of `folder` on `device`, with the experts of `layers` on meta."""
    kind, paths = type(skeleton), set(module_paths(skeleton, layers))

    class Bare(kind):  # type: ignore[misc, valid-type]
        """As its parent, with nothing where experts would be: what is not there is not loaded."""

        _keys_to_ignore_on_load_unexpected = [  # noqa: RUF012
            *(kind._keys_to_ignore_on_load_unexpected or []), *(rf"^{path}\.".replace(".", r"\.") for path in paths),
            r"\.experts\.",
        ]  # fmt: skip

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            for path in paths:
                module = self.get_submodule(path)
                for name in expert_weights(module):
                    del module._parameters[name]
                module._is_hf_initialized = True

    Bare.__name__, Bare.__qualname__, Bare.__module__ = kind.__name__, kind.__qualname__, kind.__module__
    model = Bare.from_pretrained(folder)
    model.__class__ = kind
    for path in paths:
        for name, weight in expert_weights(skeleton.get_submodule(path)).items():
            setattr(model.get_submodule(path), name, nn.Parameter(weight, requires_grad=False))
    if device.type != "cpu":
        _place(model, device)
    return model.eval()


@torch.no_grad()
def _place(model: nn.Module, device: torch.device) -> None:
    """Move what has contents: `Module.to` refuses a model with anything on meta. (`device_map` needs accelerate.)"""
    for parameter in model.parameters():
        if parameter.device.type != "meta":
            parameter.data = parameter.data.to(device)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.device.type != "meta":
                module._buffers[name] = buffer.to(device)


def module_paths(model: Any, layers: tuple[MoeLayer, ...]) -> list[str]:
    """Where the experts modules of `layers` are in `model`, in order."""
    names = {id(module): name for name, module in model.named_modules()}
    return [names[id(layer.experts)] for layer in layers]
