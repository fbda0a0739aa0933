"""The command line and the environment: what becomes a setting, and what is refused before anything is loaded."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import fields, replace
from importlib import metadata
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
from mlx_overlay_server import cli, options
from mlx_overlay_server.settings import EngineOptions, Limits, Settings

from tests.support.processes import PYTHON, environment, finish

FLAGS: list[tuple[str, str, str, Any]] = [
    ("--model-path", "/a", "model_paths", ("/a",)),
    ("--exclude", "org/m", "exclude", ("org/m",)),
    ("--below", "/shared", "below", ("/shared",)),
    ("--map", "org/m=/data/m", "maps", {"org/m": "/data/m"}),
    ("--offline", "", "is_offline", True),
    ("--hold-downloads", "", "hold_downloads", True),
    ("--model", "org/m", "models", ("org/m",)),
    ("--alias", "gpt-5=org/m", "aliases", {"gpt-5": "org/m"}),
    ("--default-model", "org/m", "default_model", "org/m"),
    ("--host", "0.0.0.0", "host", "0.0.0.0"),
    ("--port", "0", "port", 0),
    ("--api-key", "secret", "api_key", "secret"),
    ("--cors-allow-origins", "http://a,http://b", "origins", ("http://a", "http://b")),
    ("--log-level", "debug", "log_level", "debug"),
    ("--log-format", "json", "log_format", "json"),
    ("--memory-budget", "24G", "memory_budget", 24 * 10**9),
    ("--idle-ttl", "0.5", "idle_ttl", 0.5),
    ("--prompt-cache", "1G", "engine.cache_bytes", 10**9),
    ("--kv-disk", "1G", "engine.kv_disk", 10**9),
    ("--no-wired-memory", "", "engine.no_wired_memory", True),
    ("--kv-bits", "4", "engine.kv_bits", 4),
    ("--kv-group-size", "32", "engine.kv_group_size", 32),
    ("--quantized-kv-start", "0", "engine.quantized_kv_start", 0),
    ("--max-batch", "8", "engine.batch_size", 8),
    ("--max-queue", "0", "limits.waiting_requests", 0),
    ("--max-body", "1M", "limits.body", 10**6),
    ("--max-messages", "5", "limits.messages", 5),
    ("--preparation-seconds", "2.5", "limits.preparation_seconds", 2.5),
    ("--max-prompt", "100", "limits.prompt_tokens", 100),
    ("--max-tokens", "100", "limits.answer_tokens", 100),
    ("--prefill-step", "64", "engine.prefill_step", 64),
    ("--max-stall-ms", "100", "engine.max_stall_ms", 100),
    ("--shutdown-seconds", "0", "shutdown_seconds", 0.0),
    ("--load-seconds", "30", "engine.load_seconds", 30.0),
    ("--draft-model", "org/d", "draft_model", "org/d"),
    ("--num-draft-tokens", "5", "engine.num_draft_tokens", 5),
    ("--adapter-path", "/lora", "adapter_path", "/lora"),
    ("--trust-remote-code", "", "engine.trust_remote_code", True),
    ("--pipeline", "", "engine.is_pipeline", True),
]


def _read(*arguments: str, environ: Mapping[str, str] | None = None) -> Settings:
    return options.read(options.make_parser().parse_args(arguments), environ or {})


@pytest.mark.parametrize(("flag", "text", "name", "value"), FLAGS)
def test_a_flag_is_a_setting(flag: str, text: str, name: str, value: Any) -> None:
    model = ("--model", "org/m") if flag in ("--draft-model", "--adapter-path") else ()
    read = attrgetter(name)
    assert read(_read(*model, flag, *([text] if text else []))) == value
    assert read(_read()) != value


def test_every_flag_has_a_setting_and_every_setting_a_flag() -> None:
    flags = {option for action in options.make_parser()._actions for option in action.option_strings}
    assert flags - {"-h", "--help", "--version"} == {flag for flag, *_ in FLAGS}
    nested = {"engine": EngineOptions, "limits": Limits}
    names = {each.name for each in fields(Settings)} - nested.keys()
    names |= {f"{outer}.{each.name}" for outer, owner in nested.items() for each in fields(owner)}
    assert names - {"profiles", "keys"} == {name for _, _, name, _ in FLAGS}, "these two are in the file alone"


def test_a_flag_that_is_not_given_has_the_default_of_its_dataclass() -> None:
    settings = _read("--memory-budget", "8G")
    assert replace(settings.engine, cache_bytes=0) == EngineOptions(cache_bytes=0)
    assert settings.limits == Limits()
    assert replace(settings, engine=EngineOptions()) == Settings(memory_budget=8 * 10**9)


def test_help_shows_the_defaults_there_are() -> None:
    help_ = " ".join(options.make_parser().format_help().split())
    for default in (
        f"default: {EngineOptions().batch_size}",
        f"default: {Limits().waiting_requests}",
        "default: 64M",
        "default: 127.0.0.1",
        "default: info",
        "default: 5 ",
    ):
        assert default in help_
    assert "None" not in help_


def test_flags_that_may_be_repeated_keep_their_order() -> None:
    settings = _read(
        *("--model-path", "/b", "--model-path", "/a"),
        *("--model", "org/b", "--model", "org/a"),
        *("--exclude", "x", "--exclude", "y"),
        *("--alias", "b=org/b", "--alias", "a=org/a=1"),
        *("--cors-allow-origins", "http://b, http://a", "--cors-allow-origins", "http://c,"),
    )
    assert settings.model_paths == ("/b", "/a")
    assert settings.models == ("org/b", "org/a")
    assert settings.exclude == ("x", "y")
    assert settings.aliases == {"b": "org/b", "a": "org/a=1"}
    assert settings.origins == ("http://b", "http://a", "http://c")


def test_by_default_the_server_is_this_machine_s_alone() -> None:
    settings = _read()
    assert (settings.host, settings.port, settings.api_key, settings.origins) == ("127.0.0.1", 10240, None, ())
    assert not settings.engine.trust_remote_code
    assert settings.memory_budget is None


def test_the_prompt_cache_has_its_share_of_the_budget() -> None:
    assert _read("--memory-budget", "8G").engine.cache_bytes == 10**9
    assert _read("--memory-budget", "8G", "--prompt-cache", "1M").engine.cache_bytes == 10**6
    assert _read().engine.cache_bytes is None, "it is found out once the engine knows the machine"


@pytest.mark.parametrize(
    ("arguments", "variable", "expected"),
    [
        ((), "from-variable", "from-variable"),
        (("--api-key", "from-flag"), "from-variable", "from-flag"),
        ((), "", None),
        (("--api-key", ""), "from-variable", "from-variable"),
    ],
)
def test_the_key_comes_from_the_flag_or_else_from_the_environment(
    arguments: tuple[str, ...], variable: str, expected: str | None
) -> None:
    assert _read(*arguments, environ={"MLX_OMNI_API_KEY": variable}).api_key == expected


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--port", "x"], "'x' is not a port"),
        (["--port", "65536"], "is not a port"),
        (["--port", "-1"], "is not a port"),
        (["--port", "²"], "is not a port"),
        (["--memory-budget", "much"], "'much' is not a size"),
        (["--memory-budget", "inf"], "'inf' is not a size"),
        (["--max-body", "-1"], "is not a size"),
        (["--idle-ttl", "soon"], "is not a number of seconds"),
        (["--idle-ttl", "-1"], "is not a number of seconds"),
        (["--idle-ttl", "nan"], "is not a number of seconds"),
        (["--shutdown-seconds", "inf"], "is not a number of seconds"),
        (["--max-batch", "0"], "at least 1"),
        (["--max-queue", "few"], "is not a whole number"),
        (["--kv-bits", "5"], "invalid choice"),
        (["--log-level", "loud"], "invalid choice"),
        (["--alias", "gpt-5"], "NAME=ID"),
        (["--alias", "=org/m"], "NAME=ID"),
        (["--alias", "gpt-5="], "NAME=ID"),
        (["--alias", "gpt-5=a", "--alias", "gpt-5=b"], "gpt-5 is a and b; leave one of them out"),
        (["--map", "org/m=/a", "--map", "org/m=/b"], "org/m is /a and /b; leave one of them out"),
        (["--draft-model", "org/d"], "--model"),
        (["--adapter-path", "/lora"], "--model"),
        (["--nonsense"], "unrecognized arguments"),
        (["extra"], "there is no command 'extra'; there are ls, pull, "),
        (["laucnh", "claude"], "did you mean launch?"),
    ],
)
def test_what_cannot_be_is_a_usage_error_in_one_line(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith("mlx-omni-server: error: ")
    assert told in last


@pytest.mark.parametrize("flag", ["--draft-model", "--adapter-path"])
def test_under_mlx_launch_what_mlx_lm_cannot_do_is_refused(flag: str) -> None:
    with pytest.raises(ValueError, match=r"under mlx\.launch"):
        _read("--model", "org/m", flag, "x", environ={"MLX_RANK": "0"})


_LOADED = """
import sys
from mlx_overlay_server import cli, options
try:
    cli.main({arguments})
except SystemExit as exit_:
    print(exit_.code)
heavy = {{"fastapi", "starlette", "uvicorn", "mlx", "mlx_lm", "huggingface_hub", "transformers", "pydantic", "numpy"}}
print(sorted(heavy & sys.modules.keys()))
"""


@pytest.mark.parametrize(("arguments", "status"), [(["--help"], "0"), (["--port", "x"], "2"), (["--alias", "x"], "2")])
def test_help_and_usage_errors_load_nothing_that_takes_its_time(arguments: list[str], status: str, home: Path) -> None:
    done = finish([PYTHON, "-c", _LOADED.format(arguments=arguments)], environment(home))
    assert done.lines()[-2:] == [status, "[]"], done.err


def test_help_tells_how_to_begin(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["--help"])
    out = capsys.readouterr().out
    assert caught.value.code == 0
    assert all(flag in out for flag, *_ in FLAGS)
    assert "MLX_OMNI_MODEL_PATH" in out
    assert "MLX_OMNI_API_KEY" in out


def test_options_that_mean_nothing_to_a_service_are_refused(home: Path) -> None:
    done = finish([PYTHON, "-m", "mlx_overlay_server", "service", "status", "--replace"], environment(home))
    assert (done.status, done.err) == (
        2,
        "mlx-omni-server: error: service status replaces nothing; leave out --replace\n",
    )


def test_the_version_is_the_distributions(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"mlx-omni-server {metadata.version('mlx-overlay-server')}\n"


def test_the_command_is_installed() -> None:
    assert (Path(sys.executable).parent / "mlx-omni-server").exists()


def test_a_host_that_this_machine_has_no_address_of_is_told(home: Path) -> None:
    done = finish([PYTHON, "-m", "mlx_overlay_server", "--port", "0", "--host", "192.0.2.1"], environment(home))
    assert done.status == 1
    assert done.lines() == []
    assert done.err.splitlines()[-1].startswith("mlx-omni-server: error: cannot listen on 192.0.2.1:0: ")
    assert done.err.endswith("; correct --host\n")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
@pytest.mark.parametrize(
    ("command", "to", "status", "said"),
    [
        ("config", ">/dev/full", 1, "mlx-omni-server: error: [Errno 28] No space left on device\n"),
        ("--version", ">/dev/full", 1, "mlx-omni-server: error: [Errno 28] No space left on device\n"),
        ("--help", ">/dev/full", 1, "mlx-omni-server: error: [Errno 28] No space left on device\n"),
        ("key add ann", ">/dev/full", 1, "mlx-omni-server: error: [Errno 28] No space left on device\n"),
        ("config", ">&-", 0, ""),
        ("--such", ">/dev/null 2>/dev/full", 2, ""),
    ],
)
def test_output_that_cannot_be_written_ends_without_a_traceback(
    command: str, to: str, status: int, said: str, home: Path
) -> None:
    line = f"{sys.executable} -m mlx_overlay_server {command} {to}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False, env=environment(home))
    assert (done.returncode, done.stdout, done.stderr) == (status, "", said)
    assert not (home / ".config").exists(), "there is a hash of a key that nobody has"


def test_a_key_for_which_the_disk_has_no_room_leaves_the_file_as_it_was(home: Path, tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text("#" * 1000 + "\n")
    line = f"ulimit -f 1; exec {sys.executable} -m mlx_overlay_server key add ann"
    done = finish(["bash", "-c", line], environment(home, HF_OVERLAY_CONFIG=str(file)))
    assert done.status == 1
    assert done.err == (
        f"mlx-omni-server: error: cannot write {file}: No space left on device; "
        "make it writable, and then another key, for this one does not count\n"
    )
    assert file.read_text() == "#" * 1000 + "\n"


_SERVED = """
import sys
from mlx_overlay_server import cli, run
run.serve = lambda live: 0
sys.modules["mlx"] = sys
sys.argv = ["mlx-omni-server"]
cli.main()
"""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
@pytest.mark.parametrize("to", [">&-", "2>&-", ">&- 2>/dev/full"])
def test_a_server_whose_output_cannot_be_written_stops_well(to: str, home: Path) -> None:
    line = f"{sys.executable} -c '{_SERVED}' {to}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False, env=environment(home))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
