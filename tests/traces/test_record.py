"""Recording: every family's own ids, not a bit of the output changed, no row that is not a live token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from families import EXPERTS, FAMILIES, SPECS, TOP_K, tiny_model  # noqa: E402
from moeflow.traces.host_ring import HostRing, pack, unpack  # noqa: E402
from moeflow.traces.reader import load_trace  # noqa: E402
from moeflow.traces.record_command import record  # noqa: E402
from moeflow.traces.recorded_rows import ranked  # noqa: E402
from moeflow.traces.recorder import record_routing  # noqa: E402
from moeflow.traces.routers import find_stacks  # noqa: E402
from moeflow.traces.trace import DECODE, PREFILL, Trace  # noqa: E402

from moeflow.errors import InputError, UnsupportedHardwareError  # noqa: E402

NEW_TOKENS = 5
LENGTHS = (4, 7, 1)  # prompt tokens per row of the batch
ABSENT = 255


@pytest.fixture(autouse=True)
def _quiet_single_thread() -> Any:
    transformers.logging.set_verbosity_error()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # with more, float32 kernels split rows by load and bits may move
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {}


@pytest.fixture
def model(request: pytest.FixtureRequest, models: dict[str, Any]) -> Any:
    name = request.param
    if name not in models:
        models[name] = tiny_model(name)
    return models[name]


def prompts(model: Any) -> dict[str, Any]:
    """A batch of three prompts of different lengths, padded on the side that the model expects."""
    right = bool(model.config.is_encoder_decoder)
    generator = torch.Generator().manual_seed(3)
    width = max(LENGTHS)
    ids, mask = torch.zeros(len(LENGTHS), width, dtype=torch.long), torch.zeros(len(LENGTHS), width, dtype=torch.long)
    for row, length in enumerate(LENGTHS):
        place = slice(0, length) if right else slice(width - length, width)
        ids[row, place] = torch.randint(3, 90, (length,), generator=generator)
        mask[row, place] = 1
    return {"input_ids": ids, "attention_mask": mask}


def generate(model: Any, **kwargs: Any) -> Any:
    """Greedy continuation with the scores of every step."""
    return model.generate(
        **prompts(model),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **kwargs,
    )


class RouterLog:
    """What each router itself returned, by MoE layer and call, taken by a hook of its own."""

    def __init__(self, model: Any) -> None:
        self.ids: dict[int, list[Any]] = {}
        self.inputs: dict[int, list[Any]] = {}
        self.handles = [
            layer.router.register_forward_hook(self._hook(layer))
            for stack in find_stacks(model)
            for layer in stack.layers
        ]

    def _hook(self, layer: Any) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            hidden = args[0].reshape(-1, args[0].shape[-1]).clone()
            self.inputs.setdefault(layer.index, []).append(hidden)
            self.ids.setdefault(layer.index, []).append(own_ids(layer, output).clone())

        return hook

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


def own_ids(layer: Any, output: Any) -> Any:
    """[T, K] from one router's return value, without the code under test."""
    kind = type(layer.router).__name__
    if kind == "SwitchTransformersTop1Router":
        dispatch = output[0].reshape(-1, EXPERTS)
        return torch.where(dispatch.sum(-1) > 0, dispatch.argmax(-1), ABSENT)[:, None]
    if kind == "Llama4Router":
        return output[1].argmax(-1, keepdim=True)
    if kind == "DbrxRouter":
        return output.topk(TOP_K, dim=-1).indices
    return output[2].reshape(-1, output[2].shape[-1])


def record_generation(model: Any, path: Path, **options: Any) -> tuple[Trace, RouterLog, Any]:
    log = RouterLog(model)
    with record_routing(model, path, spec=SPECS.get(model.config.model_type), **options):
        result = generate(model)
    log.remove()
    return load_trace(path), log, result


def slots(model: Any, trace: Trace) -> list[np.ndarray]:
    """For each step, which of the B * S computed tokens have a row."""
    batch, width = len(LENGTHS), max(LENGTHS)
    mask = prompts(model)["attention_mask"].numpy().reshape(-1) != 0
    found = []
    for step in np.unique(trace.step):
        rows = trace.step == step
        if (trace.phase[rows] == PREFILL).all():
            found.append(np.flatnonzero(mask))
        else:
            found.append(trace.request[rows].astype(int))
        assert rows.sum() == len(found[-1]) <= batch * width
    return found


@pytest.mark.parametrize("model", FAMILIES, indirect=True)
class TestEveryFamily:
    def test_records_the_ids_that_its_own_router_returns(self, model: Any, tmp_path: Path) -> None:
        trace, log, _ = record_generation(model, tmp_path / "t.parquet")
        stacks = find_stacks(model)
        layers = trace.experts.shape[1]
        assert sum(len(calls) for calls in log.ids.values()) >= NEW_TOKENS * len(stacks[-1].layers)
        calls = dict.fromkeys(range(layers), 0)
        for step, kept in zip(np.unique(trace.step), slots(model, trace), strict=True):
            rows = trace.experts[trace.step == step]
            encoder = len(stacks) > 1 and bool((trace.phase[trace.step == step] == PREFILL).all())
            ran = stacks[0 if encoder or len(stacks) == 1 else 1].layers
            for layer in range(layers):
                if layer not in {one.index for one in ran}:
                    assert (rows[:, layer] == ABSENT).all()
                    continue
                expected = log.ids[layer][calls[layer]].numpy()[kept]
                calls[layer] += 1
                assert np.array_equal(np.sort(rows[:, layer]), np.sort(expected))
        weights = trace.weights.astype(np.float32)
        assert (np.diff(weights, axis=-1) <= 0).all()

    def test_does_not_change_a_bit_of_the_output(self, model: Any, tmp_path: Path) -> None:
        plain = generate(model)
        paired = model.config.is_encoder_decoder
        options = {"probs": True} if paired else {"probs": True, "lookahead": 2}
        _, _, recorded = record_generation(model, tmp_path / "t.parquet", **options)
        assert torch.equal(plain.sequences, recorded.sequences)
        for before, after in zip(plain.logits, recorded.logits, strict=True):
            assert torch.equal(before, after)
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())

    def test_rows_are_the_tokens_without_padding(self, model: Any, tmp_path: Path) -> None:
        trace, _, result = record_generation(model, tmp_path / "t.parquet")
        given, paired = prompts(model), model.config.is_encoder_decoder
        for request, length in enumerate(LENGTHS):
            mine = trace.request == request
            prefill = mine & (trace.phase == PREFILL)
            expected = given["input_ids"][request][given["attention_mask"][request] == 1]
            assert trace.token[prefill].tolist() == expected.tolist()
            assert trace.position[mine].tolist() == list(range(mine.sum()))
            sequence = result.sequences[request, 0 if paired else max(LENGTHS) :].tolist()
            output = sequence[: sequence.index(2)] if 2 in sequence else sequence[:-1]
            assert trace.token[mine & (trace.phase == DECODE)].tolist() == output
            assert trace.meta.requests[request].prompt_tokens == length
            ended = len(output) if paired else len(output) + 1
            assert trace.meta.requests[request].output_tokens == ended

    def test_lookahead_asks_the_later_layers_own_gate(self, model: Any, tmp_path: Path) -> None:
        if model.config.is_encoder_decoder:
            with pytest.raises(InputError, match="switch_transformers"):
                record_generation(model, tmp_path / "t.parquet", lookahead=1)
            return
        trace, log, _ = record_generation(model, tmp_path / "t.parquet", lookahead=2)
        layers = find_stacks(model)[0].layers
        kept = slots(model, trace)
        for source in layers:
            for target in layers[source.index + 1 : source.index + 3]:
                rows = trace.lookahead[:, source.index + 1, target.index - source.index - 1]
                expected = []
                for call, kept_here in enumerate(kept):
                    hidden = log.inputs[source.index][call]
                    expected.append(ask(model, target, hidden).numpy()[kept_here])
                assert np.array_equal(np.sort(rows), np.sort(np.concatenate(expected)))
        assert (trace.lookahead[:, len(layers)] == ABSENT).all()
        assert (trace.lookahead[:, 0, 0] != ABSENT).all()


def ask(model: Any, layer: Any, hidden: Any) -> Any:
    """Ids [T, K] that the MoE block of `layer` chooses for router input [T, H], through the block's own code."""
    caught: list[Any] = []
    handle = layer.router.register_forward_hook(lambda module, args, output: caught.append(own_ids(layer, output)))
    whole_layer = hasattr(layer.block, "self_attn")  # Gemma 4 keeps router and experts in the decoder layer itself
    try:
        with torch.no_grad():
            layer.router(hidden) if whole_layer else layer.block(hidden[None])
    finally:
        handle.remove()
    return caught[0]


def tiny(name: str, **changes: Any) -> Any:
    """A fresh tiny model of a family with some of its configuration changed."""
    kept = dict(FAMILIES[name])
    FAMILIES[name].update(changes)
    try:
        return tiny_model(name)
    finally:
        FAMILIES[name] = kept


def plain_batch(rows: int = 2, length: int = 6) -> dict[str, Any]:
    ids = torch.randint(3, 90, (rows, length), generator=torch.Generator().manual_seed(5))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class TestWhatARowIs:
    def test_a_sequence_ends_with_its_stop_token(self, tmp_path: Path) -> None:
        model = tiny("olmoe")
        model.generation_config.eos_token_id = None
        free = model.generate(**prompts(model), max_new_tokens=8, do_sample=False)[:, max(LENGTHS) :].tolist()
        stop = free[0][2]
        model.generation_config.eos_token_id = stop
        with record_routing(model, tmp_path / "t.parquet"):
            model.generate(**prompts(model), max_new_tokens=8, do_sample=False)
        trace = load_trace(tmp_path / "t.parquet")
        for request, tokens in enumerate(free):
            end = tokens.index(stop) if stop in tokens else 7
            mine = (trace.request == request) & (trace.phase == DECODE)
            assert trace.token[mine].tolist() == tokens[:end]
        assert trace.meta.requests[0].stop_reason == "eos"
        assert trace.meta.requests[0].output_tokens == free[0].index(stop) + 1

    def test_each_generate_call_brings_new_requests(self, tmp_path: Path) -> None:
        model = tiny("olmoe")
        with record_routing(model, tmp_path / "t.parquet") as recording:
            for rows in (2, 1, 1):
                model.generate(**plain_batch(rows), max_new_tokens=3, do_sample=False)
            assert recording.batch == [3]
            recording.note(3, domain="prose", stop_reason="length")
        trace = load_trace(tmp_path / "t.parquet")
        assert [request.id for request in trace.meta.requests] == [0, 1, 2, 3]
        assert trace.meta.requests[3].domain == "prose"
        assert trace.step.tolist() == sorted(trace.step.tolist())
        assert np.unique(trace.step).tolist() == list(range(9))
        first = trace.step == 0
        assert trace.request[first].tolist() == [0] * 6 + [1] * 6
        assert trace.position[first].tolist() == [*range(6), *range(6)]

    def test_a_continued_conversation_keeps_its_request(self, tmp_path: Path) -> None:
        model = tiny("olmoe")
        cache = transformers.DynamicCache()
        with record_routing(model, tmp_path / "t.parquet"), torch.no_grad():
            for part in plain_batch(2, 9)["input_ids"].split((5, 1, 3), dim=1):
                model(part, past_key_values=cache)
        trace = load_trace(tmp_path / "t.parquet")
        assert sorted(set(trace.request.tolist())) == [0, 1]
        assert trace.position[trace.request == 1].tolist() == list(range(9))
        assert trace.phase[trace.request == 0].tolist() == [0] * 5 + [1] + [0] * 3

    def test_prompts_given_as_embeddings_have_no_token_ids(self, tmp_path: Path) -> None:
        model = tiny("olmoe")
        with record_routing(model, tmp_path / "t.parquet"), torch.no_grad():
            model(inputs_embeds=model.get_input_embeddings()(plain_batch()["input_ids"]))
        assert set(load_trace(tmp_path / "t.parquet").token.tolist()) == {-1}

    def test_image_tokens_are_flagged(self, tmp_path: Path) -> None:
        model = tiny("qwen3_vl_moe")
        ids = torch.tensor([[5, 92, 90, 90, 90, 90, 93, 6]])
        side = 4 * model.config.vision_config.patch_size // model.config.vision_config.patch_size
        values = 3 * model.config.vision_config.temporal_patch_size * model.config.vision_config.patch_size**2
        pixels = torch.randn(side * side, values, generator=torch.Generator().manual_seed(1))
        with record_routing(model, tmp_path / "t.parquet"), torch.no_grad():
            model(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                pixel_values=pixels,
                image_grid_thw=torch.tensor([[1, side, side]]),
                mm_token_type_ids=(ids == 90).int(),
            )
        assert load_trace(tmp_path / "t.parquet").flags.tolist() == [0, 0, 8, 8, 8, 8, 0, 0]

    def test_dropped_tokens_of_a_full_switch_expert_are_absent(self, tmp_path: Path) -> None:
        model = tiny("switch_transformers", expert_capacity=1)
        trace, _, _ = record_generation(model, tmp_path / "t.parquet")
        encoder = trace.experts[trace.phase == PREFILL][:, :2]
        assert (encoder == ABSENT).any() and (encoder != ABSENT).any()

    @pytest.mark.parametrize("experts", [255, 256, 257])
    def test_ids_fit_whatever_the_number_of_experts(self, experts: int, tmp_path: Path) -> None:
        trace, _, _ = record_generation(
            tiny("olmoe", num_experts=experts, num_hidden_layers=2), tmp_path / "t.parquet", lookahead=1
        )
        assert trace.experts.dtype == (np.uint8 if experts == 255 else np.uint16)
        assert trace.experts.max() < experts
        assert (trace.lookahead[:, -1] == trace.absent).all()

    def test_the_clock_runs_forward(self, tmp_path: Path) -> None:
        trace, _, _ = record_generation(tiny("olmoe"), tmp_path / "t.parquet", timing=True)
        assert (trace.step_ns[:, 1] > trace.step_ns[:, 0]).all()
        assert (np.diff(trace.step_ns[:, 0]) >= 0).all()


class TestLookaheadAndProbabilities:
    def test_row_0_is_the_embedding_as_it_enters_layer_0(self, tmp_path: Path) -> None:
        model = tiny("mixtral")
        trace, _, _ = record_generation(model, tmp_path / "t.parquet", lookahead=3)
        embedded = model.get_input_embeddings()(torch.from_numpy(trace.token.astype(np.int64)))
        for target in find_stacks(model)[0].layers:
            expected = ask(model, target, embedded).numpy()
            assert np.array_equal(np.sort(trace.lookahead[:, 0, target.index]), np.sort(expected))

    @pytest.mark.parametrize("name", ["olmoe", "deepseek_v3", "gpt_oss"])
    def test_probabilities_are_the_familys_own_scores(self, name: str, tmp_path: Path) -> None:
        model = tiny(name)
        trace, log, _ = record_generation(model, tmp_path / "t.parquet", lookahead=1, probs=True)
        layers = find_stacks(model)[0].layers
        router = layers[0].router
        kept = slots(model, trace)[0]
        logits = torch.nn.functional.linear(log.inputs[0][0], router.weight, getattr(router, "bias", None))
        scores = (logits.sigmoid() if name == "deepseek_v3" else logits.softmax(-1)).detach().numpy()[kept]
        assert np.allclose(trace.probs[: len(kept), 0], scores, atol=1e-3)
        # what the embedding's row says about layer 0 comes with a probability of that same kind
        guess = trace.lookahead[:, 0, 0].astype(int)
        assert ((trace.lookahead_weights[:, 0, 0] > 0) & (trace.lookahead_weights[:, 0, 0] <= 1)).all()
        assert (np.diff(trace.lookahead_weights[:, 0, 0].astype(np.float32)) <= 0).all()
        assert guess.shape[-1] == TOP_K

    @pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
    def test_a_wider_lookahead_begins_with_the_gates_choice(self, name: str, tmp_path: Path) -> None:
        model = tiny(name)
        narrow, _, _ = record_generation(model, tmp_path / "a.parquet", lookahead=2)
        wide, _, _ = record_generation(model, tmp_path / "b.parquet", lookahead=2, lookahead_width=5)
        assert wide.lookahead.shape[-1] == 5
        assert np.array_equal(wide.lookahead[..., :TOP_K], narrow.lookahead)
        present = wide.lookahead[:, 0, 0]
        assert all(len(set(row)) == 5 for row in present.tolist())

    def test_columns_can_be_left_out(self, tmp_path: Path) -> None:
        trace, _, _ = record_generation(
            tiny("olmoe"), tmp_path / "t.parquet", lookahead=1, lookahead_weights=False, weights=False
        )
        assert trace.weights is None and trace.lookahead_weights is None and trace.probs is None

    def test_a_gate_that_reads_more_than_its_input_is_refused_by_name(self, tmp_path: Path) -> None:
        model = tiny("olmoe")
        block = find_stacks(model)[0].layers[1].block
        block.gate = WithState(block.gate)
        with pytest.raises(InputError, match=r"olmoe.*more than the router input"):
            record_only(model, tmp_path / "t.parquet", lookahead=1)
        assert not list(tmp_path.iterdir())


class WithState(torch.nn.Module):
    """A router that also reads what an earlier router left behind."""

    def __init__(self, router: Any) -> None:
        super().__init__()
        self.router = router
        self.register_forward_pre_hook(lambda module, args: (*args, torch.zeros(1, 3)))

    def forward(self, hidden: Any, state: Any) -> Any:
        return self.router.forward(hidden)


def record_only(model: Any, path: Path, **options: Any) -> None:
    with record_routing(model, path, **options):
        generate(model)


class TestNothingChanges:
    @pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_under_any_experts_implementation(self, implementation: str, dtype: Any, tmp_path: Path) -> None:
        model = tiny("qwen3_moe").to(dtype)
        model.set_experts_implementation(implementation)
        plain = generate(model)
        trace, log, recorded = record_generation(model, tmp_path / "t.parquet", lookahead=2, probs=True)
        assert torch.equal(plain.sequences, recorded.sequences)
        assert all(torch.equal(a, b) for a, b in zip(plain.logits, recorded.logits, strict=True))
        own = [log.ids[0][step].numpy()[kept] for step, kept in enumerate(slots(model, trace))]
        assert np.array_equal(np.sort(trace.experts[:, 0]), np.sort(np.concatenate(own)))
        assert trace.meta.model.dtype == str(dtype).removeprefix("torch.")

    def test_in_what_is_sampled(self, tmp_path: Path) -> None:
        model, sampling = tiny("olmoe"), {"max_new_tokens": 6, "do_sample": True, "temperature": 1.5, "top_k": 0}
        torch.manual_seed(11)
        plain = model.generate(**prompts(model), **sampling)
        torch.manual_seed(11)
        with record_routing(model, tmp_path / "t.parquet", lookahead=2):
            recorded = model.generate(**prompts(model), **sampling)
        assert torch.equal(plain, recorded)

    def test_in_gradients(self, tmp_path: Path) -> None:
        model, found = tiny("olmoe"), []
        for recording in (False, True):
            model.zero_grad()
            if recording:
                with record_routing(model, tmp_path / "t.parquet", lookahead=1):
                    loss = model(**plain_batch(), labels=plain_batch()["input_ids"]).loss
            else:
                loss = model(**plain_batch(), labels=plain_batch()["input_ids"]).loss
            loss.backward()
            found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))

    def test_and_two_recordings_have_the_same_bytes(self, tmp_path: Path) -> None:
        model = tiny("olmoe")
        for name in ("a", "b"):
            record_only(model, tmp_path / name, lookahead=2)
        assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


class TestRefusals:
    def test_a_dense_model(self, tmp_path: Path) -> None:
        config = transformers.AutoConfig.for_model("llama", **FAMILIES["mixtral"])
        self._refused(transformers.AutoModelForCausalLM.from_config(config), "llama is dense", tmp_path)

    def test_a_family_without_the_interface(self, tmp_path: Path) -> None:
        config = transformers.AutoConfig.for_model("jetmoe", **FAMILIES["mixtral"], kv_channels=8)
        model = transformers.AutoModelForCausalLM.from_config(config)
        self._refused(model, "jetmoe cannot be recorded.*experts interface", tmp_path)

    def test_options_that_the_model_cannot_meet(self, tmp_path: Path) -> None:
        model = tiny("olmoe")
        self._refused(model, r"--lookahead 4 must lie in 0\.\.3", tmp_path, lookahead=4)
        self._refused(model, r"--lookahead-width 9 must lie in 2\.\.8", tmp_path, lookahead=1, lookahead_width=9)

    def test_an_error_inside_the_block_leaves_no_file_and_no_hook(self, tmp_path: Path) -> None:
        model = tiny("olmoe")
        with pytest.raises(ZeroDivisionError), record_routing(model, tmp_path / "t.parquet"):
            generate(model)
            raise ZeroDivisionError
        assert not list(tmp_path.iterdir())
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())

    def _refused(self, model: Any, why: str, folder: Path, **options: Any) -> None:
        with pytest.raises(InputError, match=why):
            record_only(model, folder / "t.parquet", **options)
        assert not list(folder.iterdir())


def test_ranks_follow_the_weights_and_ties_go_to_the_lower_id() -> None:
    ids = np.array([[3, 1, 2], [5, 4, 7], [6, 2, 0]], np.uint8)
    weights = np.array([[0.5, 0.5, 0.1], [0.1, 0.6, 0.3], [0.2, 0.4, 0.4]], np.float16)
    ordered, by = ranked(ids, weights)
    assert ordered.tolist() == [[3, 1, 2], [4, 7, 5], [0, 2, 6]]  # the first row descends already
    assert (np.diff(by.astype(float), axis=-1) <= 0).all()


def test_packed_columns_come_back() -> None:
    columns = {
        "odd": torch.arange(3, dtype=torch.uint8),
        "ids": torch.tensor([[-1, 300]], dtype=torch.int16),
        "halves": torch.tensor([0.5, -2.0], dtype=torch.float16),
        "tokens": torch.tensor([-1, 70_000], dtype=torch.int32),
    }
    payload, layout = pack(columns)
    back = unpack(payload.numpy(), layout)
    assert back["odd"].tolist() == [0, 1, 2] and back["tokens"].tolist() == [-1, 70_000]
    assert back["ids"].tolist() == [[65535, 300]] and back["halves"].tolist() == [0.5, -2.0]


class SlowCopies(HostRing):
    """A ring whose copies land only when they are waited for, as on a device that is far behind."""

    class Landing:
        def __init__(self) -> None:
            self.landed = False

        def query(self) -> bool:
            return self.landed

        def synchronize(self) -> None:
            self.landed = True

    longest = 0

    def push(self, payload: Any, note: Any) -> None:
        self.waiting.append((note, payload.clone(), self.Landing()))
        type(self).longest = max(self.longest, len(self.waiting))


def test_copies_in_flight_are_bounded_and_arrive_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from moeflow.traces import host_ring, recorder

    model = tiny("olmoe")
    record_only(model, tmp_path / "fast", lookahead=1)
    monkeypatch.setattr(recorder, "HostRing", SlowCopies)
    monkeypatch.setattr(host_ring, "IN_FLIGHT", 3)
    record_only(model, tmp_path / "slow", lookahead=1)
    assert (tmp_path / "fast").read_bytes() == (tmp_path / "slow").read_bytes()
    assert SlowCopies.longest == 3


class TestCommand:
    @pytest.fixture(scope="class")
    @classmethod
    def folder(cls, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """A model folder as `save_pretrained` leaves it, with a character tokenizer and a card."""
        from tokenizers import Tokenizer, models, pre_tokenizers

        folder = tmp_path_factory.mktemp("models") / "tiny-olmoe"
        tiny("olmoe").save_pretrained(folder)
        words = {chr(33 + number): number for number in range(90)}
        tokenizer = Tokenizer(models.WordLevel({**words, "?!": 96}, unk_token="?!"))
        tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
        transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?!").save_pretrained(folder)
        (folder / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
        return folder

    @pytest.fixture
    def prompt_file(self, tmp_path: Path) -> Path:
        path = tmp_path / "prompts.jsonl"
        lines = [{"prompt": "hello", "domain": "prose"}, {"text": "x = 1"}, {"prompt": "abcdefghij", "id": 7}]
        path.write_text("\n".join(map(json.dumps, lines)))
        return path

    def test_records_prompts_from_a_file(self, folder: Path, prompt_file: Path, tmp_path: Path) -> None:
        out = tmp_path / "out.parquet"
        record(str(folder), str(prompt_file), out, max_new_tokens=4, batch_size=2, lookahead=2, max_prompt_tokens=6)
        trace = load_trace(out)
        assert [request.prompt_tokens for request in trace.meta.requests] == [5, 5, 6]
        assert [request.domain for request in trace.meta.requests] == ["prose", None, None]
        assert {request.stop_reason for request in trace.meta.requests} <= {"length", "eos"}
        assert trace.meta.model.name == "tiny-olmoe" and trace.meta.licence == "mit"
        assert trace.meta.lookahead_distances == (1, 2)
        assert trace.meta.recorded["prompts"]["truncated"] == 1
        assert str(tmp_path) not in json.dumps(trace.meta.recorded)

    def test_without_arguments_it_records_the_bundled_model(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        record(limit=2, max_new_tokens=2, device="cpu")
        trace = load_trace("trace.parquet")
        assert trace.experts.shape[1:] == (16, 8) and trace.meta.model.experts == 64
        assert trace.meta.recorded["prompts"]["source"] == "bundled"
        assert all(request.domain for request in trace.meta.requests)

    def test_sampling_depends_on_the_seed_alone(self, folder: Path, prompt_file: Path, tmp_path: Path) -> None:
        tokens = []
        for seed in (1, 1, 2):
            out = tmp_path / "out.parquet"
            record(str(folder), str(prompt_file), out, max_new_tokens=8, temperature=2.0, seed=seed, force=True)
            tokens.append(load_trace(out).token.tolist())
        assert tokens[0] == tokens[1] != tokens[2]

    def test_reads_prompts_from_stdin(self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import io

        monkeypatch.setattr("sys.stdin", io.StringIO("one prompt\n\nanother\n"))
        record(str(folder), "-", tmp_path / "out.parquet", max_new_tokens=2)
        assert len(load_trace(tmp_path / "out.parquet").meta.requests) == 2

    @pytest.mark.parametrize(
        ("options", "why"),
        [
            ({"model": "./nowhere"}, "no such folder"),
            ({"prompts": "nowhere.txt"}, "cannot be read"),
            ({"lookahead": 9}, "--lookahead 9 must lie in"),
            ({"chat": True}, "no chat template"),
            ({"device": "gpu"}, "--device 'gpu' is unknown"),
            ({"dtype": "int4"}, "--dtype 'int4' is unknown"),
            ({"max_new_tokens": 1000}, "lower --max-new-tokens"),
            ({"out": Path("nowhere/out.parquet")}, "its folder does not exist"),
        ],
    )
    def test_bad_input_is_one_sentence_and_leaves_nothing(
        self, options: dict[str, Any], why: str, folder: Path, prompt_file: Path, tmp_path: Path
    ) -> None:
        out = tmp_path / "out.parquet"
        with pytest.raises(InputError, match=why) as caught:
            record(**{"model": str(folder), "prompts": str(prompt_file), "out": out, **options})
        assert caught.value.exit_status == 2 and "\n" not in str(caught.value)
        assert [path.name for path in tmp_path.iterdir()] == ["prompts.jsonl"]

    @pytest.mark.parametrize(
        ("text", "why"),
        [("", "holds no prompts"), ("[1]", "line 1: is not an object"), ('{"text": ""}', "has no text"), ("{", "JSON")],
    )
    def test_bad_prompts_are_named_by_line(self, text: str, why: str, folder: Path, tmp_path: Path) -> None:
        (tmp_path / "p.jsonl").write_text(text)
        with pytest.raises(InputError, match=why):
            record(str(folder), str(tmp_path / "p.jsonl"), tmp_path / "out.parquet")

    def test_never_overwrites_unasked(self, folder: Path, prompt_file: Path, tmp_path: Path) -> None:
        (tmp_path / "out.parquet").write_text("precious")
        with pytest.raises(InputError, match=r"exists already.*--force"):
            record(str(folder), str(prompt_file), tmp_path / "out.parquet")
        assert (tmp_path / "out.parquet").read_text() == "precious"

    def test_missing_hardware_is_told_apart(self, folder: Path, prompt_file: Path, tmp_path: Path) -> None:
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        missing = "npu" if found is None or found.type != "npu" else "xpu"
        with pytest.raises(UnsupportedHardwareError, match=f"--device {missing}"):
            record(str(folder), str(prompt_file), tmp_path / "out.parquet", device=missing)
