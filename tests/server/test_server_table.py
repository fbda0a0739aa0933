"""The table [server] of the configuration file: what it sets, and how each mistake in it is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hf_overlay import UsageError, configfile
from mlx_overlay_server import configuration, options
from mlx_overlay_server.access import digest
from mlx_overlay_server.settings import Key, Profile, Settings

HASH = digest(b"secret")
GOOD = f"""
model_path = ["/models"]

[server]
port = 8000
memory_budget = "8G"
idle_ttl = 1.5
offline = true
model = ["org/a", "org/b"]
default_model = "short"

[server.alias]
short = "code"

[server.profile."org/a"]
pin = true
idle_ttl = 0

[server.profile.code]
model = "org/b"
temperature = 0
chat_template_kwargs = {{ enable_thinking = false }}

[server.key.ann]
hash = "{HASH}"
models = ["code"]
rate = 1
"""
MISTAKES = {
    "a name that is close": ("[server]\n\nprot = 1\n", 3, "no setting 'prot'; write port"),
    "a dash": ("[server]\nmemory-budget = 1\n", 2, "write memory_budget"),
    "a name of nothing": ("[server]\nqqqqq = 1\n", 2, "each flag of `mlx-omni-server --help` is one"),
    "what hf-overlay reads": ('[server]\nmodel_path = ["/a"]\n', 2, "put it above [server]"),
    "a key in clear": ('[server]\napi_key = "x"\n', 2, "mlx-omni-server key add NAME"),
    "what belongs to a model": ('[server]\nadapter_path = "/a"\n', 2, "below [server.profile.ID]"),
    "no number": ('[server]\nport = "x"\n', 2, "'x' is not a port"),
    "a number too large": ("[server]\nport = 65536\n", 2, "is not a port"),
    "a list": ("[server]\nport = [1]\n", 2, "write a text or a number"),
    "no list": ('[server]\nmodel = "org/a"\n', 2, "write a list of texts"),
    "no switch": ("[server]\noffline = 1\n", 2, "write true or false"),
    "none of the choices": ('[server]\nlog_level = "loud"\n', 2, "write one of debug, info, warning, error"),
    "aliases in a list": ('[server]\nalias = ["a=b"]\n', 2, "write [server.alias]"),
    "an alias to nothing": ("[server.alias]\na = 1\n", 2, "'a' must lead to a model"),
    "a profile that is no table": ("[server.profile]\na = 1\n", 2, 'write [server.profile."a"]'),
    "an alias and a profile": ('[server.alias]\na = "b"\n[server.profile.a]\nmodel = "b"\n', 3, "is an alias, too"),
    "a profile of nothing": ("[server.profile.a]\npin = true\n", 1, "needs the model that it is for"),
    "no setting of a profile": ('[server.profile."a/b"]\n\ncolor = 1\n', 3, "a profile has no setting 'color'"),
    "no bits": ('[server.profile."a/b"]\nkv_bits = 5\n', 2, "kv_bits must be one of 2, 3, 4, 6, 8, or 0"),
    "guesses of nobody": ('[server.profile."a/b"]\nnum_draft_tokens = 2\n', 2, "write draft_model beside it"),
    "too hot": ('[server.profile."a/b"]\ntemperature = 3\n', 2, "temperature must be a number from 0 to 2"),
    "no text": ('[server.profile."a/b"]\nsystem = 3\n', 2, "system must be a text"),
    "a relative path": ('[server.profile."a/b"]\nadapter_path = "x"\n', 2, "the whole path of a folder"),
    "a template that is away": ('[server.profile."a/b"]\nchat_template = "/no/x"\n', 2, "cannot be read: No such file"),
    "a template that is no file": (
        '[server.profile."a/b"]\nchat_template = "/dev/zero"\n',
        2,
        "cannot be read: Not a regular file",
    ),
    "an argument of ours": ('[server.profile."a/b".chat_template_kwargs]\ntools = 1\n', 2, "the server sets tools"),
    "a key without its hash": ("[server.key.ann]\nrate = 1\n", 1, "needs the hash of a key"),
    "a key in place of its hash": ('[server.key.ann]\n\nhash = "secret"\n', 3, "needs the hash of a key"),
    "no rate": (f'[server.key.ann]\nhash = "{HASH}"\nrate = 0\n', 3, "rate must be a number of requests"),
    "no models": (f'[server.key.ann]\nhash = "{HASH}"\nmodels = "a"\n', 3, "models must be a list"),
    "no setting of a key": (f'[server.key.ann]\nhash = "{HASH}"\nmodel = "a"\n', 3, "a key has no 'model'"),
}


@pytest.fixture
def file(home: Path) -> Path:
    path = home / ".config/hf-overlay/config.toml"
    path.parent.mkdir(parents=True)
    return path


def _load(home: Path, *flags: str, **environ: str) -> Settings:
    return configuration.load(options.make_parser().parse_args(flags), {"HOME": str(home), **environ})


def test_it_sets_what_flags_set_and_profiles_and_keys(home: Path, file: Path) -> None:
    file.write_text(GOOD)
    settings = _load(home)
    assert (settings.port, settings.memory_budget, settings.idle_ttl) == (8000, 8 * 10**9, 1.5)
    assert settings.engine.cache_bytes == 10**9, "a share of the budget, as with the flag"
    assert settings.model_paths == ("/models",), "which stands above the table"
    assert (settings.is_offline, settings.models) == (True, ("org/a", "org/b"))
    assert (settings.aliases, settings.default_model) == ({"short": "code"}, "short")
    assert settings.profiles == {
        "org/a": Profile(model="org/a", pin=True, idle_ttl=0),
        "code": Profile(model="org/b", temperature=0, chat_template_kwargs={"enable_thinking": False}),
    }
    assert settings.keys == (Key(name="ann", digest=HASH, models=("code",), rate=1),)


def test_flags_beat_the_environment_which_beats_the_file(home: Path, file: Path) -> None:
    file.write_text(GOOD)
    settings = _load(home, "--port", "1", "--model", "org/c", "--alias", "x=y", MLX_OMNI_API_KEY="from-variable")
    assert (settings.port, settings.models, settings.aliases) == (1, ("org/c",), {"x": "y"})
    assert settings.api_key == "from-variable"
    assert settings.memory_budget == 8 * 10**9
    assert _load(home, MLX_OMNI_MODEL_PATH="/x:/y").model_paths == ("/x", "/y")
    file.write_text('[server.profile."a/b"]\nadapter_path = "/lora"\n')
    with pytest.raises(UsageError, match=r"config\.toml:1: under mlx\.launch"):
        _load(home, MLX_RANK="0")


def test_each_setting_knows_where_it_comes_from(home: Path, file: Path) -> None:
    file.write_text(GOOD)
    arguments = options.make_parser().parse_args(["--host", "0.0.0.0"])
    found = configuration.origins(arguments, {"HOME": str(home), "MLX_OMNI_API_KEY": "x"})
    assert found["host"] == ("0.0.0.0", "--host")
    assert found["port"] == (8000, f"{file}:5")
    assert found["alias"].origin == f"{file}:12"
    assert found["api_key"].origin == "MLX_OMNI_API_KEY"
    assert found["max_batch"] == (32, "default")
    assert found["profile code"].origin == f"{file}:19"
    assert found["key ann"].origin == f"{file}:24"


@pytest.mark.parametrize(("text", "line", "told"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_named_with_file_and_line(home: Path, file: Path, text: str, line: int, told: str) -> None:
    file.write_text(text)
    with pytest.raises(UsageError) as caught:
        _load(home)
    assert str(caught.value).startswith(f"{file}:{line}: ")
    assert told in str(caught.value)


def test_hf_overlay_goes_by_the_rest_of_the_file(file: Path) -> None:
    found = configfile.parse(str(file), GOOD)
    assert found.model_path == ("/models",)
    assert set(found.server) == {"port", "memory_budget", "idle_ttl", "offline", "model", "default_model", "alias",
                                 "profile", "key"}  # fmt: skip


def test_a_chat_template_is_read_from_its_file(home: Path, file: Path, tmp_path: Path) -> None:
    template = tmp_path / "chat.jinja"
    template.write_text("{{ messages }}")
    file.write_text(f'[server.profile."a/b"]\nchat_template = "{template}"\n')
    assert _load(home).profiles["a/b"].chat_template == "{{ messages }}"


def test_every_flag_is_a_setting_of_the_file_or_is_refused_by_name(home: Path, file: Path) -> None:
    declared: dict[str, Any] = {}
    options.make_parser(declared)
    for action in declared.values():
        key = action.option_strings[0][2:].replace("-", "_")
        file.write_text(f"[server]\n{key} = {{}}\n" if key != "alias" else "[server]\nalias = 1\n")
        with pytest.raises(UsageError) as caught:
            _load(home)
        assert key in str(caught.value)
        assert "no setting '" not in str(caught.value)
