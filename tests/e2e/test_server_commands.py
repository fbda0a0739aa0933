"""The commands of mlx-omni-server, each as somebody with an empty home runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hf_overlay import hfcache

from tests.support.hfcache import listing
from tests.support.loopback_hub import LoopbackHub
from tests.support.models import make_model, make_random_model
from tests.support.processes import BIN, PYTHON, SECONDS, Finished, environment, eventually, finish, start
from tests.support.server import serving

SERVER = str(BIN / "mlx-omni-server")


def _run(home: Path, *arguments: str, **environ: str) -> Finished:
    return finish([SERVER, *arguments], environment(home, HF_OVERLAY_DIR=str(home / "sessions"), **environ))


def _check_log(log: str) -> None:
    """Who asked what, and how it went; never a word of it."""
    lines = [json.loads(line) for line in log.splitlines()]
    answered, refused = [line for line in lines if line["message"] == "request"]
    assert (answered["model"], answered["outcome"], answered["reason"]) == ("acme/tiny-chat", "answered", "stop")
    assert answered["client"].startswith("OpenAI")
    assert all(answered[name] > 0 for name in ("tokens_in", "tokens_out", "first_token_seconds"))
    assert (refused["model"], refused["outcome"], refused["reason"]) == ("acme/none", "refused", "model_not_found")
    assert "eheim" not in log
    assert "Hello" not in log


@pytest.fixture
def model(models: Path) -> Path:
    return make_model(models / "acme" / "tiny-chat", "Hello.", is_brief=True)


def test_ls_lists_the_models_of_folders_and_cache(home: Path, models: Path, model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "vision_config": {}}))
    done = _run(home, "ls", "--model-path", str(models))
    assert done.lines()[0].split() == ["ID", "KIND", "SOURCE", "SIZE", "TYPE", "PATH"]
    assert done.lines()[1].split()[:4] == ["acme/tiny-chat", "text,", "images", "custom"]
    assert str(model) in done.lines()[1]
    (row,) = json.loads(_run(home, "ls", "--json", MLX_OMNI_MODEL_PATH=str(models)).out)
    assert (row["id"], row["path"], row["kind"], row["images"]) == ("acme/tiny-chat", str(model), "text", True)


def test_an_empty_home_has_no_models_and_is_told_what_to_do(home: Path) -> None:
    done = _run(home, "ls")
    assert (done.status, done.out) == (0, "")
    assert "mlx-omni-server pull " in done.err
    assert "mlx-omni-server doctor" in done.err


def test_ps_finds_the_running_server_by_itself(home: Path, models: Path, model: Path) -> None:
    with serving(home, models, options=["--offline", "--log-format", "json"]) as server:
        assert "no model is in the memory of" in _run(home, "ps").err
        server.chat("acme/tiny-chat", "Geheime Frage")
        body = {"model": "acme/none", "messages": [{"role": "user", "content": "x"}]}
        assert server.http.post("/v1/chat/completions", json=body).status_code == 404
        _check_log(server.log())
        (row,) = json.loads(_run(home, "ps", "--json").out)
        assert (row["id"], row["state"], row["users"]) == ("acme/tiny-chat", "resident", 0)
        assert _run(home, "ps", "--url", server.url).lines()[1].split()[:2] == ["acme/tiny-chat", "resident"]
        assert _run(home, "stop", "other").status == 1
        done = _run(home, "stop", "tiny")
        assert (done.status, done.err) == (0, "mlx-omni-server: unloaded acme/tiny-chat\n")
        assert json.loads(_run(home, "ps", "--json").out) == []
        assert _run(home, "doctor", "--model-path", str(models)).status == 0
    done = _run(home, "ps")
    assert (done.status, done.out) == (1, "")
    assert (
        done.err == "mlx-omni-server: error: no server runs here; start one (mlx-omni-server), or name one with --url\n"
    )


def test_bench_starts_a_server_for_itself_and_leaves_nothing(home: Path, models: Path) -> None:
    make_random_model(models / "acme" / "random")
    done = _run(
        *(home, "bench", "random", "--model-path", str(models), "--streams", "1,2", "--tokens", "4"),
        *("--prompt-tokens", "20"),
    )
    assert done.status == 0, done.err
    title, empty, head, _, *rows = done.lines()
    assert title.startswith("acme/random, 4 tokens a stream; mlx-overlay-server ")
    assert (empty, head.split()[1]) == ("", "streams")
    assert [row.split()[1] for row in rows] == ["1", "2"]
    assert not list((home / "sessions").glob("session-*"))
    done = _run(home, "bench", "other", "--model-path", str(models))
    assert (done.status, done.out) == (1, "")
    assert "acme/random" in done.err, "it says what there is"


@pytest.mark.parametrize("url", ["ftp://x", "", "http://", "http://[::1"])
def test_an_address_that_is_none_is_a_usage_error(home: Path, url: str) -> None:
    done = _run(home, "ps", "--url", url)
    assert done.status == 2
    assert "http://127.0.0.1:10240" in done.err


def test_options_before_a_command_are_refused_and_not_dropped(home: Path) -> None:
    done = _run(home, "--model-path", "/a", "ls")
    assert (done.status, done.out) == (2, "")
    assert "mlx-omni-server ls …" in done.err


def test_doctor_exits_1_for_a_problem_and_names_it(home: Path, models: Path, model: Path) -> None:
    (model / "tokenizer.json").unlink()
    (model / "tokenizer_config.json").unlink()
    done = _run(home, "doctor", "--json", "--model-path", str(models))
    assert done.status == 1
    assert str(model) in {finding["where"] for finding in json.loads(done.out)}


def _online(hub: LoopbackHub, home: Path) -> dict[str, str]:
    return {
        **environment(home),
        **hub.environment(home),
        "HF_HUB_OFFLINE": "0",
        "HF_OVERLAY_DIR": str(home / "sessions"),
    }


def test_pull_downloads_into_the_real_cache_and_never_into_a_folder(
    home: Path, hub: Path, models: Path, model: Path, tmp_path: Path
) -> None:
    made = make_model(tmp_path / "made", "Hello.", is_brief=True)
    before = listing(models)
    with LoopbackHub() as there:
        there.add_repo("org/new", {file.name: file.read_bytes() for file in made.iterdir()})
        command = [SERVER, "pull", "org/new", "--model-path", str(models)]
        done = finish(command, _online(there, home))
        assert done.status == 0, done.err
        assert done.out.startswith(str(hub / hfcache.repo_folder("org/new") / "snapshots"))
        assert "% of" in done.err
        assert "\x1b" not in done.err
        there.reset_counts()
        again = finish(command, _online(there, home))
        assert (again.status, again.out) == (0, done.out)
        assert "is here already" in again.err
        mine = finish([SERVER, "pull", "acme/tiny-chat", "--model-path", str(models)], _online(there, home))
        assert mine.lines() == [str(model)], "the user's own is not downloaded"
        assert not there.requests
    assert listing(models) == before
    assert not list((home / "sessions").glob("session-*"))


def test_pull_goes_on_where_it_was_stopped(home: Path, hub: Path, tmp_path: Path) -> None:
    blobs = hub / hfcache.repo_folder("org/new") / "blobs"

    def is_half_there() -> bool:
        return any(blob.suffix == "" and blob.stat().st_size > 50_000 for blob in blobs.glob("*"))

    made = make_model(tmp_path / "made", "Hello.", is_brief=True, shards=3)
    with LoopbackHub() as there:
        there.add_repo("org/new", {file.name: file.read_bytes() for file in made.iterdir()})
        there.hang(30, on="00003-of")
        with start([SERVER, "pull", "org/new"], _online(there, home)) as process:
            eventually(is_half_there, "a shard is there")
            process.terminate()
            assert process.wait(SECONDS) == 130
        assert not list((home / "sessions").glob("session-*"))
        there.heal()
        before = there.bytes_served("org/new")
        done = finish([SERVER, "pull", "org/new"], _online(there, home))
        assert done.status == 0, done.err
        assert 0 < there.bytes_served("org/new") - before < sum(file.stat().st_size for file in made.iterdir())


def test_pull_of_what_nobody_has_says_so(home: Path) -> None:
    with LoopbackHub() as there:
        done = finish([SERVER, "pull", "org/none"], _online(there, home))
    assert (done.status, done.out) == (1, "")
    assert "no model org/none" in done.err
    done = finish([SERVER, "pull", "org/none"], _online(there, home))
    assert (done.status, "the Hub does not answer" in done.err) == (1, True), "it has ended"
    done = _run(home, "pull", "org/none")
    assert done.status == 1
    assert "HF_HUB_OFFLINE" in done.err


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish", "tcsh"])
def test_completion_knows_commands_and_options(home: Path, shell: str) -> None:
    if shell == "fish":
        pytest.skip("shtab of this release prints none") if "fish" not in _run(home, "completion", "-h").out else None
    done = _run(home, "completion", shell)
    assert done.status == 0, done.err
    assert all(word in done.out for word in ("pull", "doctor", "model-path"))


def test_serving_imports_no_command(home: Path) -> None:
    """Start-up is as light as it was."""
    code = (
        "import sys\nfrom mlx_overlay_server import cli\ntry:\n    cli.main(['--help'])\nexcept SystemExit:\n    pass\n"
        "print(sorted(each for each in sys.modules if each.startswith('mlx_overlay_server.command')))"
    )
    done = finish([PYTHON, "-c", code], environment(home))
    assert done.lines()[-1] == "['mlx_overlay_server.command', 'mlx_overlay_server.command.parser']"


def test_config_says_what_holds_and_from_where_and_shows_no_key(home: Path, models: Path) -> None:
    file = home / ".config/hf-overlay/config.toml"
    file.parent.mkdir(parents=True)
    file.write_text(f'model_path = ["{models}"]\n[server]\nport = 8001\n[server.alias]\nx = "acme/y"\n')
    environ = {"MLX_OMNI_API_KEY": "secret"}
    done = _run(home, "config", "--host", "0.0.0.0", **environ)
    assert done.status == 0, done.err
    assert done.lines()[0] == str(file)
    cells = {line.split()[0]: line.split()[1:] for line in done.lines()[2:] if not line.startswith(" ")}
    assert cells["model_path"] == [str(models), f"{file}:1"]
    assert cells["port"] == ["8001", f"{file}:3"]
    assert cells["host"] == ["0.0.0.0", "--host"]
    assert cells["alias"] == ["x=acme/y", f"{file}:4"]
    assert cells["api_key"] == ["(hidden)", "MLX_OMNI_API_KEY"]
    assert "secret" not in done.out
    rows = json.loads(_run(home, "config", "--json", **environ).out)
    assert {"name": "port", "value": 8001, "origin": f"{file}:3"} in rows["settings"]
    file.write_text("[server]\nport = 3.5\n")
    done = _run(home, "config")
    assert (done.status, f"{file}:2: port: " in done.err) == (2, True)
