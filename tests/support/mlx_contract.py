"""What the server assumes about mlx-lm, each assumption as a function whose name says it.

`python mlx_contract.py FOLDER` checks them all with the mlx-lm that it imports, and prints {name: problem or null} as
JSON. FOLDER is empty, for models.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

Check = Callable[[Path], None]


def importing_mlx_lm_can_be_kept_from_changing_the_process_s_limits(_folder: Path) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1000, hard))
    limits = [value for name, value in vars(resource).items() if name.startswith("RLIMIT_")]
    before = [resource.getrlimit(each) for each in limits]
    original = resource.setrlimit
    import mlx_overlay_server.engine.mlx  # noqa: F401

    assert [resource.getrlimit(each) for each in limits] == before
    assert resource.setrlimit is original


def all_that_the_engine_imports_is_there(_: Path) -> None:
    import mlx_overlay_server.engine.loading  # noqa: F401


def the_patterns_of_downloads_are_a_list_in_the_source(_: Path) -> None:
    from mlx_lm import utils
    from mlx_overlay_server.models.download import patterns

    assert patterns() == utils.DEFAULT_ALLOW_PATTERNS
    assert "model*.safetensors" in patterns()


def a_state_machine_splits_text_and_flushes_what_it_held(_: Path) -> None:
    from mlx_lm.generate import TextStateMachine

    machine = TextStateMachine({"normal": [("<a>", "tool")], "tool": [("</a>", "normal")]})
    state, segments = machine.split(machine.make_state("normal"), "x<a>y</")
    assert segments == [("normal", "x"), ("tool", "y")]
    state, held, name = machine.flush(state)
    assert (held, name) == ("</", "tool")
    assert machine.flush(state)[1] == ""
    assert machine.split(machine.make_state("other"), "x")[1] == [("other", "x")], "unknown states have no marks"


def a_tokenizer_says_what_a_model_s_marks_are(folder: Path) -> None:
    from mlx_lm.generate import make_text_state_machine

    tokenizer = _tokenizer(folder, thinks=True, calls_tools=True)
    assert tokenizer.has_chat_template
    assert tokenizer.has_thinking
    assert tokenizer.has_tool_calling
    assert (tokenizer.think_start, tokenizer.tool_call_start, tokenizer.tool_call_end) == (
        "<think>",
        "<tool_call>",
        "</tool_call>",
    )
    assert list(tokenizer.think_end_tokens) == tokenizer.encode("</think>", add_special_tokens=False)
    assert tokenizer.response_initial_state is None
    call = tokenizer.tool_parser('{"name": "f", "arguments": {"x": 1}}', None)
    assert call == {"name": "f", "arguments": {"x": 1}}
    machine = make_text_state_machine(tokenizer)
    _, segments = machine.split(machine.make_state("normal"), "a<think>b</think>c<tool_call>d</tool_call>e")
    assert segments == [("normal", "a"), ("reasoning", "b"), ("normal", "c"), ("tool", "d"), ("normal", "e")]


def a_tokenizer_without_marks_for_calls_takes_those_of_json(folder: Path) -> None:
    from mlx_lm.generate import make_text_state_machine
    from mlx_overlay_server.engine import mlx_tokenizers

    tokenizer = _tokenizer(folder)
    assert not tokenizer.has_tool_calling
    mlx_tokenizers.prepare_tokenizer(tokenizer)
    assert tokenizer.has_tool_calling
    call = tokenizer.tool_parser('\n{"name": "f", "arguments": {"x": 1}}\n', None)
    assert call == {"name": "f", "arguments": {"x": 1}}
    machine = make_text_state_machine(tokenizer)
    _, segments = machine.split(machine.make_state("normal"), "a<tool_call>b</tool_call>c")
    assert segments == [("normal", "a"), ("tool", "b"), ("normal", "c")]


def each_detokenizer_is_a_new_one_with_the_methods_that_are_used(folder: Path) -> None:
    tokenizer = _tokenizer(folder)
    first, second = tokenizer.detokenizer, tokenizer.detokenizer
    assert first is not second
    for token in tokenizer.encode("Hello, world", add_special_tokens=False):
        first.add_token(token)
    text = first.last_segment
    first.finalize()
    assert text + first.last_segment == "Hello, world"
    assert second.last_segment == ""


def a_naive_detokenizer_is_known_by_its_class(folder: Path) -> None:
    from mlx_lm.tokenizer_utils import NaiveStreamingDetokenizer, TokenizerWrapper
    from mlx_overlay_server.engine import mlx_tokenizers

    tokenizer = _tokenizer(folder)
    naive = TokenizerWrapper(tokenizer._tokenizer, NaiveStreamingDetokenizer)
    assert isinstance(naive.detokenizer, NaiveStreamingDetokenizer)
    made = mlx_tokenizers.detokenizer(naive)
    assert not isinstance(made, NaiveStreamingDetokenizer)
    for token in tokenizer.encode("né", add_special_tokens=False):
        made.add_token(token)
    made.finalize()
    assert made.last_segment == "né"


def the_wrapped_tokenizer_is_one_that_llguidance_takes(folder: Path) -> None:
    from mlx_overlay_server.engine import mlx_tokenizers

    tokenizer = _tokenizer(folder)
    mlx_tokenizers.prepare_tokenizer(tokenizer)
    assert mlx_tokenizers.grammar_tokenizer(tokenizer, len(tokenizer)).vocab_size == len(tokenizer)


def caches_that_can_batch_have_merge_and_the_others_have_not(_: Path) -> None:
    from mlx_lm.models import cache
    from mlx_overlay_server.engine import mlx

    class Model:
        def __init__(self, *layers: Any) -> None:
            self._layers = list(layers)

        def make_cache(self) -> list[Any]:
            return self._layers

    batching = (cache.KVCache(), cache.RotatingKVCache(4), cache.CacheList(cache.KVCache()))
    assert mlx.can_batch(Model(*batching))
    for alone in (cache.QuantizedKVCache(), cache.ChunkedKVCache(4)):
        assert not mlx.can_batch(Model(cache.KVCache(), alone))


def recurrent_models_that_batch_say_the_same_beside_longer_prompts_and_the_others_do_not(_: Path) -> None:
    import importlib

    import mlx.core as mx
    from mlx.utils import tree_map
    from mlx_overlay_server.engine import mlx

    from tests.support.kinds import RECURRENT

    prompts = [list(range(5, 17)), [3, 4], list(range(60, 66))]
    found = {}
    for name, config in RECURRENT.items():
        mx.random.seed(3)
        module = importlib.import_module(f"mlx_lm.models.{name}")
        model = module.Model(module.ModelArgs.from_dict({"model_type": name, **config}))
        large = tree_map(lambda each: 0.3 * mx.random.normal(each.shape) if each.ndim > 1 else each, model.parameters())
        model.update(large)
        alone = [_said(model, [prompt])[0] for prompt in prompts]
        found[name] = (mlx.can_batch(model), _said(model, prompts) == alone)
    assert all(can == is_same for can, is_same in found.values()), found
    assert {can for can, _ in found.values()} == {True, False}, "there are models of both kinds"


def a_batch_can_be_kept_from_touching_the_wired_limit(folder: Path) -> None:
    import gc

    import mlx.core as mx

    model = _model(folder)
    original: Any = (mx.device_info, mx.set_wired_limit)
    limits: list[int] = []

    def wire(nbytes: int) -> int:
        limits.append(nbytes)
        return 0

    fakes: Any = (lambda: {"max_recommended_working_set_size": 1000}, wire)
    mx.device_info, mx.set_wired_limit = fakes
    try:
        batch = _parted(model)
        batch.insert([[1, 2, 3]], 1)
        batch.read(64)
        batch.begin()
        assert batch.draw() == []
        assert batch.draw()[0].finish_reason
        del batch
        gc.collect()
        assert limits == []
        _batch(model)
        assert 1000 in limits, "a batch no longer sets the limit by itself: there is nothing to keep it from"
    finally:
        mx.device_info, mx.set_wired_limit = original


def a_batch_reads_as_many_tokens_of_each_prompt_as_it_is_told_to(folder: Path) -> None:
    batch = _parted(_model(folder))
    uid = batch.insert([list(range(1, 41))], 1)
    read = []
    for tokens in (16, 8, 15):
        (part,) = batch.read(tokens)
        assert part.uid == uid
        read.append(part.progress)
    assert read == [(16, 40), (24, 40), (39, 40)]
    assert [part.progress for part in batch.begin()] == [(40, 40)]
    assert [[row.uid for row in batch.draw()] for _ in range(2)] == [[], [uid]]


def a_batch_reads_without_drawing_and_draws_without_reading(folder: Path) -> None:
    """And both say the same as BatchGenerator does when it does them in turns."""
    prompts = [[1, 2, 3], list(range(1, 41)), list(range(1, 31))]
    model = _model(folder)
    expected = _said(model, prompts)
    batch = _parted(model)
    said: dict[int, list[int]] = {}

    def draw() -> list[int]:
        rows = batch.draw()
        for row in rows:
            said.setdefault(row.uid, []).append(row.token)
        return [row.uid for row in rows]

    first = batch.insert([prompts[0]], len(expected[0]))
    batch.read(64)
    batch.begin()
    assert draw() == [], "the last token of the prompt is read, and none is drawn yet"
    assert draw() == [first]
    others = [batch.insert([prompt], len(tokens)) for prompt, tokens in zip(prompts[1:], expected[1:], strict=True)]
    assert {part.progress[0] for part in batch.read(8)} == {8}
    assert batch.begin() == []
    assert draw() == [first]
    assert {part.uid: part.progress for part in batch.read(64)} == {others[0]: (39, 40), others[1]: (29, 30)}
    assert {part.uid for part in batch.begin()} == set(others)
    assert draw() == [first]
    while draw():
        pass
    assert list(said.values()) == expected


def a_batch_is_copied_array_by_array_where_memory_is_short_and_says_the_same(folder: Path) -> None:
    import mlx.core as mx

    model = _model(folder)
    prompts = [[1, 2, 3], list(range(1, 60)) * 20, list(range(1, 40))]

    def said(limit: int) -> dict[int, list[int]]:
        """What sequences say that join and leave."""
        before = mx.set_memory_limit(limit)
        batch = _parted(model)
        said: dict[int, list[int]] = {}
        for step in range(31):
            if step in (0, 4, 9):
                batch.insert([prompts[step // 4]], 20 if step == 0 else 6)
                batch.read(2000)
            batch.begin()
            for row in batch.draw():
                said.setdefault(row.uid, []).append(row.token)
            batch.settle()
        mx.set_memory_limit(before)
        return said

    expected = said(1 << 40)
    assert [len(tokens) for tokens in expected.values()] == [20, 6, 6]
    assert said(1) == expected


def a_batch_tells_of_prompts_segments_and_tokens(folder: Path) -> None:
    from mlx_lm.generate import StopSequences

    batch = _batch(_model(folder))
    calls: list[int] = []

    def processor(tokens: Any, logits: Any) -> Any:
        calls.append(len(tokens))
        return logits

    (uid,) = batch.insert_segments(
        segments=[[[1, 2, 3], [4, 5]]],
        max_tokens=[2],
        caches=[None],
        all_tokens=[[]],
        samplers=[lambda logprobs: logprobs.argmax(axis=-1)],
        logits_processors=[[processor]],
        stop_sequences=[StopSequences([(10**6,)])],
    )
    parts: list[Any] = []
    rows: list[Any] = []
    kept: list[int] = []
    while not (rows and rows[-1].finish_reason):
        read, drawn = batch.next()
        parts += read
        rows += drawn
        if [part for part in read if part.end_of_segment and not part.end_of_prompt] and not kept:
            ((cache, tokens),) = batch.extract_cache([uid]).values()
            kept = [len(tokens), *(layer.offset for layer in cache)]
    assert [part.progress for part in parts if part.end_of_prompt] == [(5, 5)]
    assert kept == [3, 3, 3], "the first segment's cache is there when it ends"
    assert [row.finish_reason for row in rows] == [None, "length"]
    assert rows[0].prompt_cache is None
    assert list(rows[-1].all_tokens)[:5] == [1, 2, 3, 4, 5]
    assert rows[-1].prompt_cache[0].offset == len(rows[-1].all_tokens)
    assert calls[:2] == [5, 6], "processors see the prompt as well"


def processors_can_ask_which_tokens_their_step_reads(folder: Path) -> None:
    batch = _parted(_model(folder))
    asked: dict[int, list[int]] = {}

    def asks(uid: int) -> Callable[[Any, Any], Any]:
        def processor(tokens: Any, logits: Any) -> Any:
            if uid in asked:
                asked[uid].append(batch.current(uid))
                assert asked[uid][-1] == tokens[-1].item()
            asked.setdefault(uid, [])
            return logits

        return processor

    drawn: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for step in range(12):
        if step in drawn:
            prompt = list(range(1, 4 + step))
            assert batch.insert([prompt], 4, processors=[asks(step)]) == step
            batch.read(64)
            batch.begin()
        for row in batch.draw():
            drawn[row.uid].append(row.token)
    assert all(len(tokens) == 4 for tokens in drawn.values()), drawn
    assert all(asked[uid][:3] == tokens[:3] for uid, tokens in drawn.items()), (asked, drawn)


def a_sequence_taken_out_of_a_batch_leaves_its_cache(folder: Path) -> None:
    batch = _batch(_model(folder))
    uids = batch.insert_segments(segments=[[[1, 2, 3]], [[4, 5, 6, 7]]], max_tokens=[9, 9])
    for _ in range(4):
        batch.next()
    ((cache, tokens),) = batch.remove([uids[1]], return_prompt_caches=True).values()
    assert list(tokens)[:4] == [4, 5, 6, 7]
    assert all(layer.offset == len(tokens) for layer in cache)
    assert {row.uid for row in batch.next()[1]} == {uids[0]}


def a_generator_goes_on_with_the_caches_that_are_put_into_the_list_it_was_given(folder: Path) -> None:
    """So a sequence that runs alone can give up its KV cache and read it again."""
    import mlx.core as mx
    from mlx_lm.generate import generate_step
    from mlx_lm.models.cache import make_prompt_cache

    model = _model(folder)
    prompt = list(range(1, 9))
    said: list[list[int]] = []
    for is_paused in (False, True):
        cache = make_prompt_cache(model)
        drawn = generate_step(mx.array(prompt), model, max_tokens=9, prompt_cache=cache)
        tokens = [int(next(drawn)[0]) for _ in range(4)]
        if is_paused:
            assert {layer.offset for layer in cache} == {len(prompt) + 4}, "what was told of is read"
            cache[:] = make_prompt_cache(model)
            model(mx.array([[*prompt, *tokens]]), cache=cache)
        said.append([*tokens, *(int(token) for token, _ in drawn)])
    assert said[0] == said[1]


def closing_speculative_decoding_takes_rejected_tokens_out_of_the_caches(folder: Path) -> None:
    import mlx.core as mx
    from mlx_lm.generate import speculative_generate_step
    from mlx_lm.models.cache import make_prompt_cache
    from mlx_overlay_server.engine import mlx

    model, draft = _model(folder), _model(folder.with_name("draft"), seed=1)
    prompt = list(range(1, 9))
    for count in (1, 2, 5):
        cache = make_prompt_cache(model) + make_prompt_cache(draft)
        drawn = speculative_generate_step(
            mx.array(prompt), model, draft, num_draft_tokens=3, max_tokens=20, prompt_cache=cache
        )
        tokens = [int(next(drawn)[0]) for _ in range(count)]
        size = mlx.close_alone(drawn, cache, len(prompt) + count)
        assert size is not None
        assert len(prompt) <= size <= len(prompt) + count - 1
        assert {layer.offset for layer in cache} == {size}
        whole = [*prompt, *tokens]
        plain = make_prompt_cache(model)
        model(mx.array([whole[:size]]), cache=plain)
        for ours, expected in zip(cache, plain, strict=False):
            for one, other in zip(ours.keys_and_values(), expected.keys_and_values(), strict=True):
                assert mx.allclose(one, other, atol=1e-4).item()


def a_cache_can_be_copied_into_buffers_of_its_own(_: Path) -> None:
    """Each kind: equal after more tokens, whether it was copied before or not."""
    import copy

    import mlx.core as mx
    from mlx_lm.models import cache
    from mlx_overlay_server.engine import mlx

    def tokens(count: int, start: int) -> tuple[mx.array, mx.array]:
        values = mx.random.normal((1, 2, count, 64), key=mx.random.key(start))
        return values, values * 2

    kinds: list[Callable[[], Any]] = [
        cache.KVCache,
        lambda: cache.RotatingKVCache(8, keep=2),
        lambda: cache.RotatingKVCache(600),
        cache.QuantizedKVCache,
        lambda: cache.ChunkedKVCache(8),
        cache.ConcatenateKVCache,
    ]
    for make in kinds:
        for count in (3, 20, 300):
            original = make()
            original.update_and_fetch(*tokens(count, 1))
            original.update_and_fetch(*tokens(1, 2))
            for is_listed in (False, True):
                kept = copy.deepcopy(original)
                kept = cache.CacheList(kept) if is_listed else kept
                copied = mlx.compact([kept])
                mlx.evaluate(copied)
                assert type(copied[0]) is type(kept)
                assert copied[0].nbytes <= kept.nbytes
                pairs = [each.caches[0] if isinstance(each, cache.CacheList) else each for each in (kept, copied[0])]
                for size in (1, 5):
                    one, other = (json.dumps(_plain(each.update_and_fetch(*tokens(size, 3)))) for each in pairs)
                    assert one == other, (type(original), count)
                assert pairs[0].offset == pairs[1].offset
    arrays = cache.ArraysCache(2)
    arrays[0] = mx.ones((1, 4))
    copied = mlx.compact([arrays])
    assert copied[0][0].tolist() == [[1.0] * 4]
    assert copied[0][1] is None
    assert mlx.head([arrays], dropping=1) is None, "what cannot be cut is not cut"
    assert mlx.compact([cache.KVCache()])[0].empty()


def a_model_without_its_head_gives_hidden_states_whole_and_in_parts(folder: Path) -> None:
    import mlx.core as mx
    from mlx_lm.utils import load_model
    from mlx_overlay_server.engine import mlx

    from tests.support.encoders import make_encoder

    for head in (None, "ForCausalLM", "ForSequenceClassification"):
        made = make_encoder(folder / str(head), "qwen3", head=head, modes=None)
        model, _ = load_model(made, get_model_classes=mlx.headless_classes)
        tokens = mx.arange(4, 10)[None]
        whole = model(tokens)
        assert whole.shape == (1, 6, 32)
        cache = mlx.new_cache(model)
        parts = mx.concatenate([model(tokens[:, :4], cache), model(tokens[:, 4:], cache)], axis=1)
        assert mx.allclose(whole, parts, atol=1e-4).item()
        assert mlx.kv_size(model, bits=None, group_size=64, start=0).token > 0
        assert ("score" in model) is (head == "ForSequenceClassification")
        assert mlx.logits_of(model)(whole).shape[:2] == (1, 6)


def a_cache_can_be_taken_apart_and_put_together(_: Path) -> None:
    """Each kind, and several of them in one layer: equal after more tokens."""
    import mlx.core as mx
    from mlx_lm.models import cache
    from mlx_overlay_server.engine import mlx, mlx_arrays

    def fill(layers: list[Any], count: int, start: int) -> list[Any]:
        values = mx.random.normal((1, 2, count, 64), key=mx.random.key(start)).astype(mx.bfloat16)
        return [_plain(each.update_and_fetch(values, values * 2)) for each in layers]

    def make() -> list[Any]:
        return [
            cache.KVCache(),
            cache.CacheList(cache.RotatingKVCache(8, keep=2), cache.ChunkedKVCache(8)),
            cache.QuantizedKVCache(),
            cache.RotatingKVCache(600),
            cache.KVCache(),  # stays empty
        ]

    for count in (1, 3, 20, 300):
        kept = make()
        fill(mlx.leaves(kept)[:-1], count, 1)
        kept = mlx.compact(kept)
        mlx.evaluate(kept)
        parts = mlx_arrays.taken_apart(kept, count)
        assert parts is not None
        assert all(array.values.shape[2] == count for array in parts.rows.values())
        assert mlx_arrays.taken_apart(kept, count + 1) is None
        made = {name: mlx_arrays.inside(array) for name, array in {**parts.rows, **parts.arrays}.items()}
        again = mlx_arrays.put_together(make(), count, made, json.loads(json.dumps(parts.outline)))
        assert mlx_arrays.layout(again) == mlx_arrays.layout(kept)
        assert mlx.leaves(again)[-1].empty()
        for size in (1, 5):
            one, other = (json.dumps(fill(mlx.leaves(each)[:-1], size, 2)) for each in (kept, again))
            assert one == other, count
    arrays = cache.ArraysCache(2)
    arrays[0] = mx.array([[1.5, 2.5]], dtype=mx.float16)
    parts = mlx_arrays.taken_apart([arrays], 7)
    assert parts is not None
    made = {name: mlx_arrays.inside(array) for name, array in parts.arrays.items()}
    (again,) = mlx_arrays.put_together([cache.ArraysCache(2)], 7, made, parts.outline)
    assert (again[0].tolist(), again[0].dtype, again[1]) == ([[1.5, 2.5]], mx.float16, None)
    assert mlx_arrays.has_states([arrays])
    assert not mlx_arrays.has_rows([arrays])


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else [_plain(each) for each in value]


def _said(model: Any, prompts: list[list[int]]) -> list[list[int]]:
    batch = _batch(model)
    said: dict[int, list[int]] = {uid: [] for uid in batch.insert(prompts, [8] * len(prompts))}
    for _ in range(50):
        for row in batch.next_generated():
            said[row.uid].append(row.token)
    assert all(len(tokens) == 8 for tokens in said.values())
    return list(said.values())


def _tokenizer(folder: Path, **options: Any) -> Any:
    from mlx_lm.utils import load_tokenizer

    from tests.support.models import make_model

    return load_tokenizer(make_model(folder, "Hello, né world", **options), {}, None)


def _model(folder: Path, *, seed: int = 0) -> Any:
    from mlx_lm.utils import load_model

    from tests.support.models import make_random_model

    return load_model(make_random_model(folder, seed=seed))[0]


def _parted(model: Any) -> Any:
    """The batch as the server has it."""
    import mlx.core as mx
    from mlx_overlay_server.engine.mlx_batch import Batch

    return Batch(model, size=4, prefill_step=64, stream=mx.default_stream(mx.default_device()))


def _batch(model: Any) -> Any:
    import mlx.core as mx
    from mlx_lm.generate import BatchGenerator

    return BatchGenerator(
        model,
        completion_batch_size=4,
        prefill_batch_size=4,
        prefill_step_size=64,
        stream=mx.default_stream(mx.default_device()),
    )


CHECKS: dict[str, Check] = {
    name: value
    for name, value in list(globals().items())
    if callable(value) and getattr(value, "__module__", "") == __name__ and not name.startswith("_")
}


def main() -> None:
    problems: dict[str, str | None] = {}
    for number, (name, check) in enumerate(CHECKS.items()):
        try:
            check(Path(sys.argv[1], str(number), "model"))
            problems[name] = None
        except Exception:  # noqa: BLE001 - whatever breaks is what the test shows
            problems[name] = traceback.format_exc()
    import mlx_lm

    print(json.dumps({"file": os.fspath(mlx_lm.__file__ or ""), "problems": problems}))


if __name__ == "__main__":
    main()
