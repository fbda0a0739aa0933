"""The support modules against the libraries they stand in for: mlx-lm, transformers, huggingface_hub."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.support.hfcache import add_repo, etag, git_blob_id, listing, repo_folder
from tests.support.models import MEDIUM, SMALL, Sizes, make_model, make_random_model, split

PLAIN = "the cat saw the cat and the cat ran."
AWKWARD = "  two  spaces\n\n\tlines é 日本語 🙂 <0x41> <|im_end|> \x00 end  "


def needs(module: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(find_spec(module) is None, reason=f"{module} is not installed")


def run_python(home: Path, *arguments: str, **environment: str) -> str:
    """Run a fresh interpreter, offline unless told otherwise and with its own HF_HOME; return its stdout."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TRANSFORMERS_"))}
    done = subprocess.run(
        [sys.executable, *arguments],
        env=kept | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(home)} | environment,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


GENERATE = """
import json, sys, warnings
warnings.simplefilter("error")
from mlx_lm import load, stream_generate
from mlx_lm.sample_utils import make_sampler

answers = []
for path in sys.argv[1:]:
    model, tokenizer = load(path)
    turns = [{"role": "user", "content": "hello, the cat"}, {"role": "assistant", "content": "the cat saw"}]
    for prompt in (
        "hi",
        "",
        tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True),
        tokenizer.apply_chat_template([*turns, turns[0]], add_generation_prompt=True, tokenize=False),
    ):
        for temperature in (0.0, 1.0):
            sampler = make_sampler(temp=temperature)
            parts = list(stream_generate(model, tokenizer, prompt, max_tokens=50, sampler=sampler))
            answers.append([path, "".join(part.text for part in parts), parts[-1].finish_reason])
print(json.dumps(answers))
"""


@needs("mlx_lm")
def test_mlx_lm_generates_the_text_and_stops(tmp_path: Path) -> None:
    says = {
        str(make_model(tmp_path / "plain", PLAIN)): PLAIN,
        str(make_model(tmp_path / "awkward", AWKWARD)): AWKWARD,
        str(make_model(tmp_path / "empty", "")): "",
        str(make_model(tmp_path / "shards", PLAIN, shards=3)): PLAIN,
        str(make_model(tmp_path / "half", AWKWARD, dtype="float16")): AWKWARD,
        str(make_model(tmp_path / "mistral", PLAIN, model_type="mistral")): PLAIN,
    }
    answers = json.loads(run_python(tmp_path / "home", "-c", GENERATE, *says))
    assert len(answers) == 8 * len(says)
    for path, text, finish_reason in answers:
        assert (text, finish_reason) == (says[path], "stop")


@needs("mlx_lm")
def test_the_command_line_generates_the_text(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", PLAIN)
    arguments = ["-m", "mlx_lm", "generate", "--model", str(model), "--prompt", "hi", "--verbose", "False"]
    assert run_python(tmp_path / "home", *arguments) == PLAIN + "\n"


@needs("transformers")
def test_transformers_reads_tokenizer_and_config(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", AWKWARD, shards=2)
    script = """
import json, sys
from transformers import AutoConfig, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
config = AutoConfig.from_pretrained(sys.argv[1])
text = "any text é 🙂 <0x41>\\n"
ids = tokenizer.encode(text)
assert ids[0] == tokenizer.bos_token_id == config.bos_token_id
assert tokenizer.decode(ids[1:]) == text
assert tokenizer.eos_token_id == config.eos_token_id
assert len(tokenizer) == config.vocab_size
turn = [{"role": "user", "content": "hi"}]
prompt = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
print(json.dumps([config.model_type, prompt]))
"""
    kind, prompt = json.loads(run_python(tmp_path / "home", "-c", script, str(model)))
    assert kind == "llama"
    assert prompt == "<|begin_of_text|><|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_model_folder_holds_the_usual_files(tmp_path: Path) -> None:
    common = {
        "config.json",
        "generation_config.json",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    whole = make_model(tmp_path / "whole", PLAIN)
    assert {path.name for path in whole.iterdir()} == common | {"model.safetensors"}
    parts = make_model(tmp_path / "parts", PLAIN, shards=2)
    shards = {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"}
    assert {path.name for path in parts.iterdir()} == common | shards | {"model.safetensors.index.json"}


def test_index_names_every_tensor_and_the_total_size(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    model = make_model(tmp_path / "model", PLAIN, shards=5)
    index = json.loads((model / "model.safetensors.index.json").read_text())
    held = {path.name: load_file(path) for path in model.glob("*.safetensors")}
    assert {tensor: file for file, tensors in held.items() for tensor in tensors} == index["weight_map"]
    total = sum(tensor.nbytes for tensors in held.values() for tensor in tensors.values())
    assert index["metadata"]["total_size"] == total
    assert len(held) == 5


def test_models_repeat_and_differ_by_text_alone(tmp_path: Path) -> None:
    def weights(folder: str, says: str) -> set[str]:
        paths = make_model(tmp_path / folder, says, shards=21).glob("*.safetensors")
        return {hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}

    assert weights("one", "the same") == weights("two", "the same")
    assert weights("one", "the same") != weights("three", "not that")


@pytest.mark.parametrize("shards", [0, 22])
def test_impossible_shard_counts_are_refused(tmp_path: Path, shards: int) -> None:
    with pytest.raises(ValueError, match="shards"):
        make_model(tmp_path / "model", PLAIN, shards=shards)


def test_pieces_join_to_the_text() -> None:
    assert split(PLAIN)[:3] == ["the", " cat", " saw"]
    for text in (PLAIN, AWKWARD, "", "\n", " "):
        assert "".join(split(text)) == text
    for mark in "\ue000\ue001":
        with pytest.raises(ValueError):
            split(mark)


def test_tags_are_pieces_of_their_own() -> None:
    assert split(CALLS) == [
        *("<think>", "Hm,", " what?", "</think>", "Let", " me", " look. "),
        *("<tool_call>", '{"name":', ' "get_weather",', ' "arguments":', ' {"city":', ' "Paris"}}', "</tool_call>"),
    ]
    assert split(" <think>\n\n</think> a<b </think>c ") == [
        *(" ", "<think>", "\n\n", "</think>", " a<b ", "</think>", "c", " "),
    ]


CHAT = """
import json, sys, warnings
warnings.simplefilter("error")
from mlx_lm import generate, load, stream_generate
from mlx_lm.generate import TextStateMachine, make_text_state_machine
from mlx_lm.sample_utils import make_sampler

def told_apart(parts):
    machine, found = make_text_state_machine(tokenizer).make_state(), []
    for part in parts:
        machine, segments = TextStateMachine.split(machine, part)
        found += segments
    states = {state: "" for state, _ in found}
    for state, text in found:
        states[state] += text
    return states

def answer(messages, options):
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, **options)
    runs = []
    for temperature in (0.0, 1.0):
        sampler = make_sampler(temp=temperature)
        runs.append([part.text for part in stream_generate(model, tokenizer, prompt, max_tokens=50, sampler=sampler)])
    assert runs[0] == runs[1]
    assert generate(model, tokenizer, prompt, max_tokens=50) == "".join(runs[0])
    states = told_apart(runs[0])
    call = tokenizer.tool_parser(states["tool"]) if "tool" in states else None
    return {"prompt": tokenizer.decode(prompt), "parts": runs[0], "states": states, "call": call}

model, tokenizer = load(sys.argv[1])
said = [answer(*chat) for chat in json.loads(sys.argv[2])]
can = [tokenizer.has_thinking, tokenizer.has_tool_calling, tokenizer.think_start_id]
print(json.dumps([can, said]))
"""

CALLS = (
    "<think>Hm, what?</think>Let me look. "
    '<tool_call>{"name": "get_weather", "arguments": {"city": "Paris"}}</tool_call>'
)
CALL = {"name": "get_weather", "arguments": {"city": "Paris"}}
ASKED = {"role": "user", "content": "hi"}
TOOLS = [{"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}]


def chat(home: Path, model: Path, *chats: tuple[list[dict[str, Any]], dict[str, Any]]) -> tuple[list[Any], list[Any]]:
    """What mlx-lm takes the model for, and what it answers to each chat."""
    can, said = json.loads(run_python(home, "-c", CHAT, str(model), json.dumps(chats)))
    return can, said


@needs("mlx_lm")
def test_a_plain_model_neither_thinks_nor_calls_tools(tmp_path: Path) -> None:
    can, (said,) = chat(tmp_path / "home", make_model(tmp_path / "model", CALLS), ([ASKED], {"tools": TOOLS}))
    assert can == [False, False, None]
    assert said["states"] == {"normal": CALLS}


@needs("mlx_lm")
def test_a_thinking_model_calls_a_tool_and_reads_its_answer(tmp_path: Path) -> None:
    after = "<think>Fine.</think>It is 20 °C 🙂\nin Paris."
    model = make_model(tmp_path / "model", CALLS, thinks=True, calls_tools=True, after_tool=after)
    wire = {"id": "a", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}}
    asks: dict[str, Any] = {"role": "assistant", "content": None, "reasoning_content": "Hm", "tool_calls": [wire, CALL]}
    answered = [ASKED, asks, {"role": "tool", "tool_call_id": "a", "content": "20"}]
    again = [*answered, {"role": "assistant", "content": "20 °C."}, ASKED]
    can, said = chat(
        tmp_path / "home",
        model,
        ([ASKED], {"tools": TOOLS}),
        ([ASKED], {"enable_thinking": False}),
        (answered, {"tools": TOOLS}),
        (answered, {"enable_thinking": False}),
        (again, {}),
    )
    assert can == [True, True, 260]
    called, brief, told, briefly_told, once_more = said

    assert called["parts"] == [*split(CALLS), ""]
    assert called["states"] == {"normal": "Let me look. ", "reasoning": "Hm, what?", "tool": json.dumps(CALL)}
    assert called["call"] == CALL
    assert f"\n<tools>\n{json.dumps(TOOLS[0])}\n</tools>\n" in called["prompt"]
    assert called["prompt"].endswith("<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
    assert brief["parts"] == once_more["parts"] == called["parts"]
    assert brief["prompt"].endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert "<tools>" not in brief["prompt"]

    assert "".join(told["parts"]) == "".join(briefly_told["parts"]) == after
    assert told["states"] == {"normal": "It is 20 °C 🙂\nin Paris.", "reasoning": "Fine."}
    call = f"<tool_call>\n{json.dumps(CALL)}\n</tool_call>"
    assert told["prompt"].endswith(
        f"<|im_start|>assistant\n<think>Hm</think>{call}\n{call}<|im_end|>\n"
        "<|im_start|>tool\n<tool_response>\n20\n</tool_response><|im_end|>\n<|im_start|>assistant\n<|after_tool|>"
    )
    assert briefly_told["prompt"].endswith("<think>\n\n</think>\n\n<|after_tool|>")
    assert "<|after_tool|>" not in called["prompt"] + once_more["prompt"]


@needs("mlx_lm")
def test_nothing_can_be_said_after_a_tool(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", "now", after_tool="")
    tool = {"role": "tool", "content": "20"}
    can, said = chat(tmp_path / "home", model, ([ASKED], {}), ([ASKED, tool], {}), ([ASKED, tool, ASKED], {}))
    assert can == [False, False, None]
    assert ["".join(answer["parts"]) for answer in said] == ["now", "", "now"]


@needs("mlx_lm")
def test_pieces_are_the_tokens_said(tmp_path: Path) -> None:
    """A character cut between tokens comes whole, with the last of its bytes."""
    smile, others = "🙂".encode(), "🙂é".encode()
    pieces: list[str | bytes] = ["x", "", "STO", "P", "STO"]
    pieces += [smile[:1], smile[1:2], smile[2:3], smile[3:], others[:2], others[2:5], others[5:]]
    pieces += [" é", "<|im_end|>", " "]
    says = "xSTOPSTO🙂🙂é é<|im_end|> "
    model = make_model(tmp_path / "model", says, pieces=pieces)
    _, (said,) = chat(tmp_path / "home", model, ([ASKED], {}))
    parts = ["x", "", "STO", "P", "STO", "", "", "", "🙂", "", "🙂", "é", " é", "<|im_end|>", " "]
    assert said["parts"] == [*parts, ""]
    with pytest.raises(ValueError, match="join"):
        make_model(tmp_path / "other", says, pieces=pieces[1:])


GRAMMAR = """
import json, sys, warnings
warnings.simplefilter("error")
import mlx.core as mx
import numpy
from llguidance import LLMatcher, hf
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask
from mlx_lm import load, stream_generate
from transformers import AutoTokenizer

model, tokenizer = load(sys.argv[1])
table = hf.from_tokenizer(AutoTokenizer.from_pretrained(sys.argv[1]))
FIRST_STEP = 260

def constrained(grammar):
    matcher, allowed = LLMatcher(table, grammar), []
    assert not matcher.get_error(), matcher.get_error()

    def mask(tokens, logits):
        if allowed:
            assert matcher.consume_token(int(tokens[-1]))
        bits = allocate_token_bitmask(1, table.vocab_size)
        fill_next_token_bitmask(matcher, bits, 0)
        fits = numpy.unpackbits(bits.view(numpy.uint8)[0], bitorder="little")[: len(tokenizer)].astype(bool)
        steps = [int(token) for token in numpy.flatnonzero(fits) if token >= FIRST_STEP]
        allowed.append([table.decode_bytes([token]).decode() for token in steps])
        return mx.where(mx.array(fits), logits, -mx.inf)

    parts = list(stream_generate(model, tokenizer, "hi", max_tokens=20, logits_processors=[mask]))
    return ["".join(part.text for part in parts), allowed[: len(parts)]]  # mlx-lm is a token ahead

schema, lark = json.loads(sys.argv[2])
never = [token for token in tokenizer.encode(sys.argv[3]) if token >= FIRST_STEP]
print(json.dumps([never, constrained(LLMatcher.grammar_from_json_schema(schema)), constrained(lark)]))
"""


@needs("mlx_lm")
@needs("llguidance")
def test_a_grammar_finds_the_steps_that_fit(tmp_path: Path) -> None:
    """The vocabulary's bytes are what is said; and encoding what is said gives none of its tokens."""
    says = '{"name":\n"Zoé", "mood": "🙂 日本", "age": 7}'
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string"}, "mood": {"type": "string"}, "age": {"type": "integer"}},
        "required": ["name", "mood", "age"],
        "additionalProperties": False,
    }
    lark = 'start: "{" /[^}]*/ "}"'
    model = make_model(tmp_path / "model", says)
    found = run_python(tmp_path / "home", "-c", GRAMMAR, str(model), json.dumps([schema, lark]), says)
    never, by_schema, by_lark = json.loads(found)
    assert never == []
    assert by_schema[0] == says
    # a text may begin with the space that other tokens begin with; after the last brace comes no step, but EOS
    assert by_schema[1] == [
        *(['{"name":'], ['\n"Zoé",', ' "🙂'], [' "mood":'], ['\n"Zoé",', ' "🙂']),
        *([' 日本",', " 7}"], [' "age":'], [" 7}"], []),
    ]
    assert by_lark[0] == says
    assert by_lark[1] == [['{"name":'], *[split(says)] * (len(split(says)) - 1), []]


@needs("mlx_lm")
def test_a_random_model_says_words_and_repeats_itself(tmp_path: Path) -> None:
    script = """
import json, sys, warnings
warnings.simplefilter("error")
import mlx.core as mx
from mlx_lm import load, stream_generate
from mlx_lm.sample_utils import make_sampler

model, tokenizer = load(sys.argv[1])
encode = tokenizer.encode
assert encode("bake Bake bami\\n🙂 ", add_special_tokens=False).count(encode("bake ")[-1]) == 1
assert tokenizer.decode(encode("bake Bake bami\\n🙂 ", add_special_tokens=False)) == "bake Bake bami\\n🙂 "
prompt = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], add_generation_prompt=True)
mx.random.seed(0)

def said(temperature):
    sampler = make_sampler(temp=temperature)
    parts = list(stream_generate(model, tokenizer, prompt, max_tokens=200, sampler=sampler))
    text = "".join(part.text for part in parts)
    assert encode(text, add_special_tokens=False) == [part.token for part in parts]
    return [text, parts[-1].finish_reason]

answers = [said(0.0), said(0.0), said(1.0), said(1.0)]
print(json.dumps([type(tokenizer.detokenizer).__name__, answers]))
"""
    first, again = (make_random_model(tmp_path / name, **SMALL) for name in ("first", "again"))
    other = make_random_model(tmp_path / "other", **SMALL, seed=1)
    assert contents(first) == contents(again)
    assert (first / "model.safetensors").read_bytes() != (other / "model.safetensors").read_bytes()

    detokenizer, answers = json.loads(run_python(tmp_path / "home", "-c", script, str(first)))
    assert detokenizer == "BPEStreamingDetokenizer"
    texts = [text for text, _ in answers]
    assert texts[0] == texts[1]
    assert len(set(texts)) == 3
    for text, finish_reason in answers:
        assert re.fullmatch("([a-z]{4} ){200}", text)
        assert finish_reason == "length"
    assert len(set(texts[2].split())) > 50


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(("sizes", "millions"), [(SMALL, 4.5), (MEDIUM, 100)])
def test_sizes_of_random_models(tmp_path: Path, sizes: Sizes, millions: float) -> None:
    """By the sum that `make_random_model` gives; a gigabyte of weights need not be written to know."""
    count = 16 * sizes["layers"] * sizes["hidden"] ** 2 + 2 * sizes["vocab"] * sizes["hidden"]
    assert count / 1e6 == pytest.approx(millions, rel=0.02)
    if sizes is SMALL:
        weights = make_random_model(tmp_path / "model", **sizes) / "model.safetensors"
        assert weights.stat().st_size / 4 == pytest.approx(count, rel=0.01)


@pytest.mark.parametrize(("vocab", "heads"), [(260, 2), (512, 3)])
def test_impossible_random_models_are_refused(tmp_path: Path, vocab: int, heads: int) -> None:
    with pytest.raises(ValueError):
        make_random_model(tmp_path / "model", vocab=vocab, heads=heads)


FILES = {
    "config.json": b'{"a": 1}\n',
    "copy.json": b'{"a": 1}\n',
    "empty.txt": b"",
    "model.safetensors": b"\x01" * 1000,
    "sub/deep/note.txt": b"note",
}
COMMIT = "ab" * 20


def test_repo_layout(tmp_path: Path) -> None:
    refs = ("main", "refs/pr/1")
    snapshot = add_repo(tmp_path, "org/name", FILES, commit=COMMIT, refs=refs, no_exist=("a/b",))
    repo = tmp_path / "models--org--name"
    assert snapshot == repo / "snapshots" / COMMIT
    assert os.readlink(snapshot / "sub/deep/note.txt") == f"../../../../blobs/{git_blob_id(b'note')}"
    weights = snapshot / "model.safetensors"
    assert os.readlink(weights) == f"../../blobs/{hashlib.sha256(weights.read_bytes()).hexdigest()}"
    assert {path.name for path in (repo / "blobs").iterdir()} == {etag(*item) for item in FILES.items()}
    assert (repo / "refs/main").read_bytes() == (repo / "refs/refs/pr/1").read_bytes() == COMMIT.encode()
    assert (repo / ".no_exist" / COMMIT / "a/b").read_bytes() == b""
    assert sorted(path.name for path in repo.iterdir()) == [".no_exist", "blobs", "refs", "snapshots"]


def test_git_blob_id_is_what_git_says() -> None:
    assert git_blob_id(b"") == "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"
    assert git_blob_id(b"hello\n") == "ce013625030ba8dba906f756967f9e9ca394464a"


def test_repo_folder_names() -> None:
    assert repo_folder("gpt2") == "models--gpt2"
    assert repo_folder("org/name", "dataset") == "datasets--org--name"


@pytest.mark.parametrize("name", ["", "/etc/passwd", "../up", "a//b", "./a"])
def test_names_outside_the_snapshot_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="relative"):
        add_repo(tmp_path, "org/name", {name: b""})


def test_commit_follows_from_the_content(tmp_path: Path) -> None:
    first = add_repo(tmp_path / "a", "org/name", FILES)
    again = add_repo(tmp_path / "b", "org/name", dict(reversed(FILES.items())))
    other = add_repo(tmp_path / "c", "org/name", FILES | {"copy.json": b"{}"})
    assert len(first.name) == 40
    assert first.name == again.name != other.name


def test_a_commit_keeps_its_bytes(tmp_path: Path) -> None:
    add_repo(tmp_path, "org/name", FILES, commit=COMMIT)
    before = listing(tmp_path / "models--org--name/blobs")
    add_repo(tmp_path, "org/name", FILES, commit=COMMIT)
    assert listing(tmp_path / "models--org--name/blobs") == before
    with pytest.raises(FileExistsError):
        add_repo(tmp_path, "org/name", {"config.json": b"other"}, commit=COMMIT)


def test_a_folder_can_be_added(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", PLAIN)
    snapshot = add_repo(tmp_path / "hub", "org/name", model)
    assert {path.name: path.read_bytes() for path in snapshot.iterdir()} == {
        path.name: path.read_bytes() for path in model.iterdir()
    }
    with pytest.raises(NotADirectoryError):
        add_repo(tmp_path / "hub", "org/other", tmp_path / "absent")


@needs("huggingface_hub")
def test_huggingface_hub_reads_the_cache(tmp_path: Path) -> None:
    hub = tmp_path / "hub"
    old = add_repo(hub, "org/name", FILES, tree=True, locks=True)
    newer = FILES | {"copy.json": b"{}"}
    new = add_repo(hub, "org/name", newer, tree=True, locks=True, no_exist=("absent.json",))
    data = add_repo(hub, "org/data", {"a.csv": b"1"}, repo_type="dataset", commit=COMMIT, refs=("main", "v1"))
    script = """
import json, sys
from huggingface_hub import _CACHED_NO_EXIST, scan_cache_dir, snapshot_download, try_to_load_from_cache

hub, old = sys.argv[1:]
info = scan_cache_dir(hub)
assert not info.warnings, info.warnings
assert try_to_load_from_cache("org/name", "absent.json", cache_dir=hub) is _CACHED_NO_EXIST
revisions = [(repo, revision) for repo in info.repos for revision in repo.revisions]
print(json.dumps([
    {str(r.snapshot_path): [p.repo_id, p.repo_type, sorted(r.refs), len(r.files)] for p, r in revisions},
    snapshot_download("org/name", cache_dir=hub, local_files_only=True),
    snapshot_download("org/name", revision=old, cache_dir=hub, local_files_only=True),
    snapshot_download("org/data", repo_type="dataset", revision="v1", cache_dir=hub, local_files_only=True),
]))
"""
    revisions, *downloads = json.loads(run_python(tmp_path / "home", "-c", script, str(hub), old.name))
    assert revisions == {
        str(old): ["org/name", "model", [], 5],
        str(new): ["org/name", "model", ["main"], 5],
        str(data): ["org/data", "dataset", ["main", "v1"], 1],
    }
    assert downloads == [str(new), str(old), str(data)]


class Hub(BaseHTTPRequestHandler):
    """Answers for one repo, "org/name" with FILES at COMMIT, what a download asks."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        if path.startswith("/api/models/org/name/tree/"):
            self.reply(200, json.dumps([self.described(*item) for item in FILES.items()]).encode())
        elif path.startswith("/api/models/org/name"):
            siblings = [{"rfilename": name} for name in FILES]
            self.reply(200, json.dumps({"id": "org/name", "sha": COMMIT, "siblings": siblings}).encode())
        else:
            name = path.partition("/resolve/")[2].partition("/")[2]
            if name in FILES:
                tag = f'"{etag(name, FILES[name])}"'
                linked = {"X-Linked-ETag": tag} if name.endswith(".safetensors") else {}
                self.reply(200, FILES[name], {"ETag": tag, **linked})
            else:
                self.reply(404, b"", {"X-Error-Code": "EntryNotFound"})

    do_HEAD = do_GET

    def described(self, name: str, content: bytes) -> dict[str, object]:
        file: dict[str, object] = {"type": "file", "path": name, "size": len(content)}
        if not name.endswith(".safetensors"):
            return file | {"oid": git_blob_id(content)}
        oid = hashlib.sha256(content).hexdigest()
        pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:%b\nsize %d\n"
        pointer %= (oid.encode(), len(content))
        lfs = {"oid": oid, "size": len(content), "pointerSize": len(pointer)}
        return file | {"oid": git_blob_id(pointer), "lfs": lfs}

    def reply(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        sent = {"X-Repo-Commit": COMMIT, "Content-Length": str(len(body))} | (headers or {})
        for name, value in sent.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def endpoint() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@needs("huggingface_hub")
def test_the_layout_is_the_one_a_download_leaves(tmp_path: Path, endpoint: str) -> None:
    """Every name, kind, mode and byte; `trees` and the tag only where this huggingface_hub writes them."""
    downloaded, made = tmp_path / "downloaded", tmp_path / "made"
    script = """
import sys
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.utils import EntryNotFoundError

snapshot_download("org/name", cache_dir=sys.argv[1])
try:
    hf_hub_download("org/name", "absent.json", cache_dir=sys.argv[1])
except EntryNotFoundError:
    pass
"""
    online = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1"}
    run_python(tmp_path / "home", "-c", script, str(downloaded), NO_PROXY="127.0.0.1", **online)
    tree = (downloaded / "models--org--name/trees").is_dir()
    add_repo(made, "org/name", FILES, commit=COMMIT, no_exist=("absent.json",), tree=tree, locks=True)
    if not (downloaded / "CACHEDIR.TAG").exists():
        (made / "CACHEDIR.TAG").unlink()

    def compared(root: Path) -> dict[str, tuple[str, int, str]]:
        found = {}
        for name, (kind, mode, _, _, detail) in listing(root).items():
            # the mode of a lock file differs between versions
            found[name] = (kind, 0 if name.endswith(".lock") else mode, detail)
        return found

    assert compared(made) == compared(downloaded)


def test_listing_describes_each_kind(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "folder").mkdir(parents=True)
    (root / "folder/file").write_bytes(b"bytes")
    (root / "folder/file").chmod(0o640)
    os.utime(root / "folder/file", ns=(1, 1_500_000_000_123_456_789))
    (root / "link").symlink_to("folder")
    os.mkfifo(root / "pipe")
    found = listing(root)
    assert list(found) == [".", "folder", "folder/file", "link", "pipe"]
    sha1 = hashlib.sha1(b"bytes").hexdigest()
    assert found["folder/file"] == ("file", 0o640, 5, 1_500_000_000_123_456_789, sha1)
    assert [found[name][0] for name in (".", "folder", "pipe")] == ["folder", "folder", "other"]
    assert (found["link"][0], found["link"][4]) == ("link", "folder")
    assert listing(root) == found
    with pytest.raises(FileNotFoundError):
        listing(tmp_path / "absent")


def flip_a_byte(root: Path) -> None:
    status = (root / "a/file").stat()
    (root / "a/file").write_bytes(b"twO")
    os.utime(root / "a/file", ns=(status.st_atime_ns, status.st_mtime_ns))


def point_elsewhere(root: Path) -> None:
    (root / "link").unlink()
    (root / "link").symlink_to("b")


def come_and_go(root: Path) -> None:
    (root / "a/new").touch()
    (root / "a/new").unlink()


CHANGES: dict[str, Callable[[Path], None]] = {
    "byte": flip_a_byte,
    "mtime": lambda root: os.utime(root / "a/file", ns=(1, 1)),
    "mode": lambda root: (root / "a/file").chmod(0o600),
    "new folder": lambda root: (root / "a/b").mkdir(),
    "gone": lambda root: (root / "a/file").unlink(),
    "come and gone": come_and_go,
    "target": point_elsewhere,
    "folder mode": lambda root: root.chmod(0o700),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_listing_shows_a_change(tmp_path: Path, change: Callable[[Path], None]) -> None:
    root = tmp_path / "root"
    (root / "a").mkdir(parents=True)
    (root / "a/file").write_bytes(b"two")
    (root / "link").symlink_to("a")
    for path in (root / "a", root):
        os.utime(path, ns=(1, 1))
    before = listing(root)
    change(root)
    assert listing(root) != before


def test_listing_records_what_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "closed").mkdir()
    (tmp_path / "closed/file").write_bytes(b"secret")
    (tmp_path / "open").write_bytes(b"")
    listdir = os.listdir

    def refuse(path: str) -> list[str]:
        if os.path.basename(path) == "closed":
            raise PermissionError(13, "Permission denied")
        return listdir(path)

    # the mode alone stops nobody when tests run as root
    (tmp_path / "closed").chmod(0o000)
    monkeypatch.setattr(os, "listdir", refuse)
    found = listing(tmp_path)
    (tmp_path / "closed").chmod(0o700)
    assert list(found) == [".", "closed", "open"]
    assert (found["closed"][1], found["closed"][4]) == (0o000, "unreadable: EACCES")
