"""A server whose configuration file is edited while it runs: aliases, profiles and keys from the next request on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.models import make_model
from tests.support.processes import BIN, environment, finish
from tests.support.server import Server, serving

WHOLE = "one two three four five six."


@pytest.fixture
def file(home: Path) -> Path:
    path = home / ".config/hf-overlay/config.toml"
    path.parent.mkdir(parents=True)
    return path


@pytest.fixture
def server(home: Path, models: Path, file: Path) -> Iterator[Server]:
    make_model(models / "acme" / "one", WHOLE, context=4096)
    make_model(models / "acme" / "two", "Two.", context=4096)
    file.write_text(f'model_path = ["{models}"]\n[server]\noffline = true\ndefault_model = "acme/one"\n')
    with serving(home) as server:
        yield server


def _ask(server: Server, model: str, **more: object) -> tuple[int, str, int]:
    """The status of an answer, its text or error, and the tokens of its prompt."""
    body = {"model": model, "messages": [{"role": "user", "content": "hi"}], **more}
    answer = server.http.post("/v1/chat/completions", json=body, headers={"Authorization": f"Bearer {server.api_key}"})
    read = answer.json()
    if answer.status_code != 200:
        return answer.status_code, read["error"]["message"], 0
    return 200, read["choices"][0]["message"]["content"], read["usage"]["prompt_tokens"]


def _cached(server: Server, model: str) -> int:
    """The tokens of a prompt that were not read again; the answer is whole."""
    completion = server.chat(model, "The same words as before, in a prompt that is long enough to be kept.")
    assert completion.choices[0].message.content == WHOLE
    assert completion.usage is not None
    assert completion.usage.prompt_tokens_details is not None
    return completion.usage.prompt_tokens_details.cached_tokens or 0


def test_edits_take_effect_at_the_next_request(server: Server, file: Path, home: Path) -> None:
    start = file.read_text()
    assert _ask(server, "unknown")[:2] == (200, WHOLE)

    file.write_text(
        f'{start}[server.alias]\nshort = "brief"\n'
        '[server.profile.brief]\nmodel = "acme/one"\nmax_tokens = 3\nsystem = "Be brief, please."\n'
        '[server.profile."acme/two"]\ncontext = 16\nmax_tokens = 1\n'
    )
    plain, brief = _ask(server, "acme/one"), _ask(server, "short")
    assert brief[1] != WHOLE, "the profile's max_tokens"
    assert WHOLE.startswith(brief[1])
    assert brief[2] > plain[2], "the profile's system prompt"
    assert _ask(server, "brief", max_tokens=100)[1] == WHOLE, "what a request says wins"
    status, message, _ = _ask(server, "acme/two", messages=[{"role": "user", "content": "x" * 200}])
    assert (status, "maximum" in message) == (400, True)
    listed = {each["id"]: each for each in server.http.get("/v1/models").json()["data"]}
    assert set(listed) == {"acme/one", "acme/two", "brief", "short"}
    assert listed["acme/two"]["max_model_len"] == 16

    file.write_text(f"{start}default_models = 1\n")
    assert _ask(server, "short")[0] == 200, "the last good configuration stays"
    assert f"{file}:5: [server] has no setting 'default_models'; write default_model" in server.log()

    file.write_text(start.replace("acme/one", "acme/two").replace("model_path = [", 'model_path = ["/elsewhere", '))
    assert _ask(server, "short")[1] == "Two."
    assert "these settings need a restart: model_path\n" in server.log()

    quantised = "kv_bits = 8\nkv_group_size = 32\nquantized_kv_start = 0\n"
    file.write_text(f'{start}[server.profile.small]\nmodel = "acme/one"\n{quantised}')
    assert _cached(server, "small") == 0, "the model's own KV cache of this prompt is not quantised"
    assert _cached(server, "small") > 0
    assert _cached(server, "acme/one") > 0
    held = {each["id"]: each["state"] for each in server.http.get("/manage/v1/status").json()["models"]}
    assert (held["small"], held["acme/one"]) == ("resident", "resident"), "one each"


def test_keys_are_made_by_a_command_and_hold_at_once(server: Server, file: Path, home: Path) -> None:
    assert _ask(server, "acme/one")[0] == 200
    command = [str(BIN / "mlx-omni-server"), "key", "add", "ann", "--model", "acme/one", "--rate", "3"]
    done = finish(command, environment(home))
    assert done.status == 0, done.err
    key = done.out.strip()
    assert key not in file.read_text(), "it is hashed at rest"
    assert file.read_text().startswith("model_path = ["), "nothing of the file is lost"
    assert _ask(server, "acme/one")[0] == 401
    headers = {"x-api-key": key}
    body = {"model": "acme/one", "messages": [{"role": "user", "content": "hi"}]}
    statuses = [server.http.post("/v1/chat/completions", json=body, headers=headers).status_code]
    statuses += [
        server.http.post("/v1/chat/completions", json=body | {"model": "acme/two"}, headers=headers).status_code
    ]
    statuses += [server.http.post("/v1/chat/completions", json=body, headers=headers).status_code for _ in range(2)]
    assert statuses == [200, 403, 200, 429]
    listed = server.http.get("/v1/models", headers=headers).json()["data"]
    assert [each["id"] for each in listed] == ["acme/one"], "the other is not for this key"
    managing = server.http.get("/manage/v1/status", headers=headers)
    assert (managing.status_code, "not for managing" in managing.text) == (403, True)
    assert key not in server.log()
    assert "INFO ann, acme/one: " in server.log(), "the log names the key"
    assert finish(command, environment(home)).status == 1, "a name has one key"
    assert "ann" in finish([*command[:2], "ls"], environment(home)).out
    ps = [command[0], "ps", "--url", server.url]
    done = finish(ps, environment(home))
    assert (done.status, "needs an API key; set it in MLX_OMNI_API_KEY" in done.err) == (1, True), "commands, too"
    assert finish(ps, environment(home, MLX_OMNI_API_KEY=key)).status == 1, "this one is not for managing"
