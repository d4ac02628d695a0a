"""An offloaded model is still the model: transformers' own tools work on it or are refused in a sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from calls import generate, inputs, model_of, offloaded, same
from moeflow.traces.bundled import BUNDLED_TRACE
from transformers import AutoTokenizer, pipeline

import moeflow
from moeflow import InputError

TINY = Path(BUNDLED_TRACE).parent / "tiny_moe"


def test_a_pipeline_over_the_bundled_checkpoint() -> None:
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    prompts = ["Once upon a time", "The"]
    with moeflow.offload(TINY, "moeflow", 0.25) as model:
        made = pipeline("text-generation", model=model, tokenizer=tokenizer)
        found = made(prompts, max_new_tokens=8, do_sample=False)
        assert 0 < moeflow.stats(model)["hit"] < 1
    assert made(prompts, max_new_tokens=8, do_sample=False) == found


def test_the_implementation_can_be_changed_while_offloaded() -> None:
    model = model_of("qwen3_moe")
    assert model.get_experts_implementation() == {"": "grouped_mm"}
    resident = {}
    for name in ("eager", "batched_mm", "grouped_mm"):
        model.set_experts_implementation(name)
        resident[name] = generate(model, 2, True)
    with moeflow.offload(model, "lru", 0.25):
        for name, expected in resident.items():
            model.set_experts_implementation(name)
            assert model.get_experts_implementation() == {"": name}
            assert same(expected, generate(model, 2, True))
        with pytest.raises(InputError, match="'sonicmoe' cannot be offloaded"):
            model.set_experts_implementation("sonicmoe")


def test_the_implementation_of_a_nested_language_model() -> None:
    model = model_of("qwen3_vl_moe")
    before = model.get_experts_implementation()
    with moeflow.offload(model, "lru", 0.25):
        assert model.get_experts_implementation() == before
        model.set_experts_implementation({"text_config": "eager"})
        assert model.get_experts_implementation()["text_config"] == "eager"
        generate(model, 1, False)
    assert model.get_experts_implementation()["text_config"] == "eager"  # what was asked for stays
    model.set_experts_implementation(before)


def test_decode_is_mirrored_where_generate_swaps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """On accelerators `generate` computes decode steps with batched_mm; the swap goes by the device's name."""
    live = offloaded(model_of("qwen3_moe"), "lru", 0.25)
    used: list[tuple[int, Any]] = []
    compute = live.live.compute

    def noting(layer: int, module: Any, implementation: Any, hidden: Any, ids: Any, weights: Any) -> Any:
        used.append((len(ids), implementation.__name__))
        return compute(layer, module, implementation, hidden, ids, weights)

    monkeypatch.setattr(live.live, "compute", noting)
    try:
        generate(live.model, 1, False)
        assert set(used) == {(7, "grouped_mm"), (1, "grouped_mm")}
        used.clear()
        with monkeypatch.context() as patch, live.decoding():
            assert live.mirrored() == {"": "grouped_mm"}
            patch.setattr(type(live.model), "device", torch.device("meta"))
            with live.decoding():
                assert live.mirrored() == {"": "batched_mm"}
            assert live.mirrored() == {"": "grouped_mm"}
    finally:
        live.detach()


def test_what_would_lose_the_experts_is_refused(tmp_path: Path) -> None:
    with moeflow.offload(model_of("qwen3_moe"), "lru", 0.25) as model:
        with pytest.raises(InputError, match="no experts to save"):
            model.save_pretrained(tmp_path)
        for move in (lambda: model.half(), lambda: model.to(torch.bfloat16), lambda: model.to("meta")):
            with pytest.raises(InputError, match="cannot be moved or converted"):
                move()
        assert model.to("cpu") is model
        assert model.eval() is model
        with pytest.raises(InputError, match="offloaded already"):
            moeflow.offload(model, "lru", 0.25)
        with pytest.raises(InputError, match="call the model itself"):
            model.model(**inputs(1, False))


def test_a_mask_that_hides_the_padding_is_noted() -> None:
    model, batch = model_of("qwen3_moe"), inputs(2, False)
    whole = torch.ones(2, 1, 7, 7, dtype=torch.bool).tril()
    expected = model(input_ids=batch["input_ids"], attention_mask=whole).logits
    with moeflow.offload(model, "lru", 0.25), pytest.warns(UserWarning, match="two-dimensional attention_mask"):
        assert torch.equal(expected, model(input_ids=batch["input_ids"], attention_mask=whole).logits)
        assert "padding was counted as text" in moeflow.stats(model)["notes"][0]


def test_two_models_of_one_class_do_not_mix() -> None:
    from families import tiny_model

    first, second = model_of("qwen3_moe"), tiny_model("qwen3_moe")
    expected = generate(first, 2, True)
    with moeflow.offload(first, "lru", 0.25), moeflow.offload(second, "lfu", 0.5):
        assert same(expected, generate(first, 2, True))
        assert same(expected, generate(second, 2, True))
        assert moeflow.stats(first)["slots"] != moeflow.stats(second)["slots"]
    with pytest.raises(InputError, match="is not offloaded"):
        moeflow.stats(first)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"policy": "no-such"}, "no policy 'no-such'"),
        ({"policy": {"cache": {"evict": "lru", "size": 3}}}, "size"),
        ({"policy": "belady"}, "knows a trace's future"),
        ({"policy": "lru-dp"}, "would read a trace"),
        ({"policy": "expertflow-b"}, "the caller of the model forms the batches"),
        ({"policy": "stride"}, "only next-gate runs live"),
        ({"policy": "skip"}, "changes the model.s output"),
        ({"budget": "3 slots"}, "the least is 5 slots"),
        ({"budget": 1.5}, "a fraction lies between 0 and 1"),
        ({"budget": "a lot"}, "expected a size"),
        ({"budget": 0.5, "vram": "1GiB"}, "say the same thing twice"),
        ({"budget": 0.5, "max_context": 5}, "leave it out with a budget"),
        ({"vram": "1MiB"}, "before any expert"),
        ({"vram": "big"}, "expected a size"),
    ],
)
def test_what_cannot_be_is_refused_and_the_model_left_alone(given: Any, words: str) -> None:
    model = model_of("qwen3_moe")
    with pytest.raises(InputError, match=words):
        moeflow.offload(model, **given)
    assert type(model).__name__ == "Qwen3MoeForCausalLM"
    assert not any(parameter.device.type == "meta" for parameter in model.parameters())


def test_a_model_that_routes_nothing() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    dense = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", vocab_size=50, **sizes))
    with pytest.raises(InputError, match="dense"):
        moeflow.offload(dense)


def test_auto_takes_what_is_free() -> None:
    with moeflow.offload(model_of("qwen3_moe")) as model:
        slots = moeflow.stats(model)["slots"]
    assert slots["held"] == 24  # every expert of three layers


def test_the_example_of_the_documentation_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).parents[2] / "docs" / "runtime.md").read_text()
    example = text.split("```python\n")[1].split("```")[0].replace("path-or-hub-id", str(TINY))
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    names: dict[str, Any] = {"inputs": tokenizer("Once", return_tensors="pt")}
    exec(compile(example.replace("max_new_tokens=100", "max_new_tokens=3"), "runtime.md", "exec"), names)
    with pytest.raises(InputError, match="is not offloaded"):
        moeflow.stats(names["model"])


def test_the_documented_statistics_are_those_that_there_are() -> None:
    text = (Path(__file__).parents[2] / "docs" / "runtime.md").read_text().split("## Statistics")[1].split("## ")[0]
    with moeflow.offload(model_of("qwen3_moe"), "lru", 0.25) as model:
        generate(model, 1, False)
        said = moeflow.stats(model)
    assert set(said) - {"policy", "exactness", "device", "slots", "passes", "layers"} <= set(text.split("`"))
    assert all(f"`{kind}`" in text or kind == "copies" for kind in said["bytes"])
    assert said["hit"] + said["late"] + said["miss"] == pytest.approx(1)
