"""What the server's options change: memory, drafts, adapters, quantised KV caches, aliases, and two ranks."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import hubs
from tests.support.models import SMALL, make_model, make_random_model
from tests.support.processes import BIN, PYTHON, SECONDS, due, environment, eventually, finish, start
from tests.support.server import Server, serving


def said(server: Server, model: str) -> str:
    return server.chat_answer(model, "Hi", stream=False, temperature=0).content


def loaded(server: Server) -> list[str]:
    found: list[str] = server.http.get("/health").json()["loaded"]
    return found


@pytest.fixture(scope="module")
def drive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three scripted models of one size, a random one, and one that is larger than all of them together."""
    drive = tmp_path_factory.mktemp("drive")
    for name in ("one", "two", "three"):
        make_model(drive / "acme" / name, f"I am {name}.")
    make_random_model(drive / "acme" / "random")
    make_random_model(drive / "acme" / "large", **SMALL)
    return drive


@pytest.fixture(scope="module")
def server(drive: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """With options that change no text."""
    options = ["--idle-ttl", "0.2", "--alias", "gpt-4o=acme/one", "--default-model", "acme/two"]
    with serving(tmp_path_factory.mktemp("home"), drive, options=options) as server:
        yield server


def test_a_memory_budget_unloads_the_least_recently_used_and_never_a_pinned_model(home: Path, drive: Path) -> None:
    """KV caches are quantised here, too."""
    size = (drive / "acme" / "one" / "model.safetensors").stat().st_size
    options = ["--memory-budget", str(int(size * 2.5)), "--model", "acme/one"]
    with serving(home, drive, options=[*options, "--kv-bits", "8", "--quantized-kv-start", "4"]) as server:
        eventually(lambda: loaded(server) == ["acme/one"], "the pinned model is loaded at the start")
        assert said(server, "acme/two") == "I am two."
        assert loaded(server) == ["acme/one", "acme/two"]
        assert said(server, "acme/three") == "I am three."
        assert loaded(server) == ["acme/one", "acme/three"]
        assert [said(server, "acme/one") for _ in range(2)] == ["I am one."] * 2
        body = {"model": "acme/large", "messages": [{"role": "user", "content": "Hi"}]}
        response = server.http.post("/v1/chat/completions", json=body)
        assert (response.status_code, response.json()["error"]["code"]) == (503, "model_too_large")
        assert "--memory-budget" in response.json()["error"]["message"], "it does not say what to do"
        assert loaded(server) == ["acme/one", "acme/three"]


def test_an_idle_model_is_unloaded_after_its_time(server: Server) -> None:
    assert said(server, "acme/one") == "I am one."
    eventually(lambda: loaded(server) == [], "the idle model is unloaded")
    assert said(server, "acme/one") == "I am one."


def test_a_draft_model_changes_no_text(home: Path, drive: Path, server: Server) -> None:
    alone = server.chat_answer("acme/random", "Hi", stream=False, temperature=0, max_tokens=40)
    options = ["--model", "acme/random", "--draft-model", "acme/random", "--num-draft-tokens", "2"]
    with serving(home, drive, options=options) as drafting:
        for stream in (False, True):
            drafted = drafting.chat_answer("acme/random", "Hi", stream=stream, temperature=0, max_tokens=40)
            assert drafted == alone
        usage = drafting.chat("acme/random", "Hi", temperature=0, max_tokens=40).usage
        assert usage is not None
        assert usage.completion_tokens == 40


def test_an_adapter_is_applied_to_its_model(home: Path, drive: Path, server: Server, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    make_adapter(drive / "acme" / "random", adapter)
    plain = server.chat_answer("acme/random", "Hi", stream=False, temperature=0, max_tokens=20)
    options = ["--model", "acme/random", "--adapter-path", str(adapter)]
    with serving(home, drive, options=options) as adapting:
        adapted = adapting.chat_answer("acme/random", "Hi", stream=False, temperature=0, max_tokens=20)
        assert said(adapting, "acme/one") == "I am one."
    assert adapted.content != plain.content


def make_adapter(model: Path, folder: Path) -> None:
    """A LoRA adapter, as mlx_lm.lora leaves it, whose weights are large enough to change what is said."""
    import numpy as np
    from safetensors.numpy import save_file

    folder.mkdir()
    parameters = {"rank": 2, "scale": 20.0, "dropout": 0.0, "keys": ["self_attn.o_proj"]}
    content = {"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": parameters}
    (folder / "adapter_config.json").write_text(json.dumps(content))
    config = json.loads((model / "config.json").read_text())
    inner = config["num_attention_heads"] * config.get(
        "head_dim", config["hidden_size"] // config["num_attention_heads"]
    )
    random = np.random.default_rng(0)
    name = f"model.layers.{config['num_hidden_layers'] - 1}.self_attn.o_proj"
    weights = {
        f"{name}.lora_a": random.standard_normal((inner, 2)).astype(np.float32),
        f"{name}.lora_b": random.standard_normal((2, config["hidden_size"])).astype(np.float32),
    }
    save_file(weights, folder / "adapters.safetensors")


def test_aliases_are_listed_and_a_default_model_answers_to_unknown_names(server: Server) -> None:
    assert "gpt-4o" in [model.id for model in server.openai.models.list()]
    assert server.chat("gpt-4o", "Hi").model == "gpt-4o", "a client is answered by the name it used"
    assert said(server, "gpt-4o") == "I am one."
    assert said(server, "claude-sonnet-4-5") == "I am two."
    assert said(server, "acme/three") == "I am three."


def test_a_wrong_option_is_a_usage_error(home: Path) -> None:
    done = finish([PYTHON, "-m", "mlx_overlay_server", "--port", "70000"], environment(home))
    assert done.status == 2
    assert "'70000' is not a port" in done.err


@pytest.mark.slow
def test_two_ranks_answer_as_one(home: Path, drive: Path, server: Server) -> None:
    alone = server.chat_answer("acme/random", "Hi", stream=False, temperature=0, max_tokens=8).content
    sessions = home / "rank-sessions"
    environ = environment(home, **hubs.environment(hubs.INSTALLED), HF_OVERLAY_DIR=str(sessions))
    command = [str(BIN / "mlx.launch"), "-n", "2", "--backend", "ring", "--starting-port", str(two_free_ports()), "--"]
    command += [PYTHON, "-m", "mlx_overlay_server", "--port", "0", "--model-path", str(drive), "--model", "acme/random"]
    log = home / "ranks.log"
    with log.open("wb") as written, start(command, environ, stdout=written, stderr=written) as process:
        eventually(lambda: bool(address(log)), "rank 0 listens")
        import httpx2

        body = {"model": "acme/random", "prompt": "Hi", "max_tokens": 8, "temperature": 0}
        chat = {**body, "messages": [{"role": "user", "content": "Hi"}]}
        del chat["prompt"]
        with httpx2.Client(base_url=address(log), timeout=due(SECONDS), trust_env=False) as http:
            answers = [http.post("/v1/chat/completions", json=chat).json() for _ in range(2)]
            sampled = http.post("/v1/completions", json={**body, "temperature": 1, "n": 3}).json()
        assert [answer["choices"][0]["message"]["content"] for answer in answers] == [alone] * 2
        assert len(sampled["choices"]) == 3
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        process.wait(due(SECONDS))
    assert not list(sessions.glob("session-*")), "a rank left its session behind"


def address(log: Path) -> str:
    """What rank 0 listens on, once it says it; until then nothing."""
    text = log.read_text("utf-8", "replace")
    return text.partition("listening on ")[2].partition(" ")[0]


def two_free_ports() -> int:
    """The first of two neighbouring ports that are free: mlx.launch cannot choose them itself.

    They are none of those that systems give to whoever asks for any, as other tests do meanwhile.
    """
    for port in range(20_000 + os.getpid() % 5_000 * 2, 32_000, 2):
        with socket.socket() as first, socket.socket() as second:
            try:
                first.bind(("127.0.0.1", port))
                second.bind(("127.0.0.1", port + 1))
            except OSError:
                continue
            return port
    raise AssertionError("no two neighbouring ports are free")
