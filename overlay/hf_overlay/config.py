"""Where the user's folders are and where huggingface_hub keeps its cache.

Pure functions of the arguments and the environment handed in; nothing here touches huggingface_hub, because it
reads these variables once, when it is imported, and by then the environment must already be ours.
"""

import os
import re
import sys
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Generic, Literal, NamedTuple, TypeVar

from hf_overlay.errors import OverlayError, UsageError

MODEL_PATH_VARIABLE = "MLX_OMNI_MODEL_PATH"
BELOW_VARIABLE = "HF_OVERLAY_BELOW"
FILE_VARIABLE = "HF_OVERLAY_CONFIG"
"""Names another configuration file; empty: none is read."""
DIRECTORY_VARIABLE = "HF_OVERLAY_DIR"
"""Names another folder for sessions."""
OWNER_FILE = ".hf-overlay-session"
"""Names the living owner in every session's folder; a scan that meets one knows the folder for ours."""

OTHER_CACHE_VARIABLES = (
    "TRANSFORMERS_CACHE",
    "PYTORCH_TRANSFORMERS_CACHE",
    "PYTORCH_PRETRAINED_BERT_CACHE",
    "LLAMA_CACHE",
)
"""Variables that a program reads before HF_HUB_CACHE: older transformers the first three, llama.cpp the last."""
PROXY_VARIABLES = ("no_proxy", "NO_PROXY")
CHANGED_VARIABLES = frozenset(
    {
        *OTHER_CACHE_VARIABLES,
        *PROXY_VARIABLES,
        "HF_HOME",
        "HF_HUB_CACHE",
        "HUGGINGFACE_HUB_CACHE",
        "HF_HUB_DISABLE_SHARED_BLOBS",
        "HF_HUB_OFFLINE",
        "HF_ENDPOINT",
    }
)
"""All environment variables that an overlay may change for a program."""

DECIDING_VARIABLES = {
    "hf_home": ("HF_HOME", "XDG_CACHE_HOME"),
    "hub_cache": ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"),
}
"""For each of huggingface_hub's folders, the variables that say where it is; the first that is set decides."""

Kind = Literal["mlx", "any"]
"""`mlx`: models that the installed mlx-lm can load; `any`: also those of transformers, diffusers, …"""

OTHER_KINDS = ("datasets", "spaces", "kernels")
"""What ids of repos that are no models begin with: `datasets/org/name`."""

_NAME = "hf-overlay"
_OVERLAY = r"/session-\d+-[0-9a-f]+/home/hub$"


class Map(NamedTuple):
    """A folder that answers to an id, wherever it lies and whatever it is called."""

    kind: str
    """`models`, `datasets`, `spaces` or `kernels`."""
    id: str
    """As `org/name`."""
    folder: str
    """An absolute path."""

    @property
    def full_id(self) -> str:
        """The id as `--map` takes it, with the kind in front where it is no model's."""
        return self.id if self.kind == "models" else f"{self.kind}/{self.id}"


class Settings(NamedTuple):
    """Everything an overlay depends on. All paths are absolute; none of them need exist."""

    roots: tuple[str, ...]
    """The user's model folders, most important first; empty: the Hugging Face cache only."""
    hub_cache: str
    """The real cache: what huggingface_hub calls HF_HUB_CACHE."""
    hf_home: str
    """The folder that huggingface_hub calls HF_HOME: tokens, Xet cache, datasets, modules."""
    kind: Kind | None = None
    """The models to take: those that mlx-lm can load, or any; None: `mlx` where mlx-lm is installed, else `any`."""
    exclude: tuple[str, ...] = ()
    """Ids for which the user's folders do not count: the cache, and the Hub, answer."""
    trusts_code: bool = False
    """Also take models whose architecture is in a Python file of their own."""
    encoders: bool = False
    """Beside models of mlx-lm, take encoders that mlx-omni-server loads."""
    holds_downloads: bool = False
    """Download also while the real cache is away or read-only; what comes is held in the session's folder."""
    below: tuple[str, ...] = ()
    """Tiers: Hugging Face caches and folders of models behind the real cache, which are only read; first to last."""
    maps: tuple[Map, ...] = ()
    """Folders that answer to an id, in front of everything else."""


class ConfigFile(NamedTuple):
    """What the configuration file says. Paths are as they were written: absolute, or with a `~`."""

    path: str | None = None
    """Where the file is, or would be; None: none is to be read."""
    text: str | None = None
    """All of it; None: there is none."""
    model_path: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    below: tuple[str, ...] = ()
    map: Mapping[str, str] = MappingProxyType({})
    """The folder for each id."""
    server: Mapping[str, Any] = MappingProxyType({})
    """The table of mlx-omni-server, which alone knows what may stand in it."""


NO_FILE = ConfigFile()

Value = TypeVar("Value")


class Given(NamedTuple, Generic[Value]):
    """A setting's value as it was given, and where."""

    value: Value
    origin: str
    """A flag, a variable, the path of the configuration file, or `default`."""


class InForce(NamedTuple):
    """The settings that a person gives, each from the first place that has it: flag, variable, file."""

    model_path: Given[Sequence[str]]
    exclude: Given[Sequence[str]]
    below: Given[Sequence[str]]
    map: Given[Mapping[str, str]]


def in_force(
    model_paths: Sequence[str],
    exclude: Sequence[str],
    environ: Mapping[str, str],
    file: ConfigFile,
    *,
    below: Sequence[str] = (),
    maps: Mapping[str, str] | None = None,
) -> InForce:
    """Choose each setting whole from the first place that gives it; what is not in `environ` or `file` are flags."""
    path = file.path or ""
    return InForce(
        model_path=_first(
            Given(model_paths, "--model-path"),
            Given(_listed(MODEL_PATH_VARIABLE, environ), MODEL_PATH_VARIABLE),
            Given(file.model_path, path),
        ),
        exclude=_first(Given(exclude, "--exclude"), Given(file.exclude, path)),
        below=_first(
            Given(below, "--below"),
            Given(_listed(BELOW_VARIABLE, environ), BELOW_VARIABLE),
            Given(file.below, path),
        ),
        map=_first(Given(maps or {}, "--map"), Given(file.map, path)),
    )


def _first(*given: Given[Value]) -> Given[Value]:
    return next((each for each in given if each.value), given[-1]._replace(origin="default"))


def load(
    model_paths: Sequence[str],
    environ: Mapping[str, str],
    cwd: str,
    *,
    kind: Kind | None = None,
    exclude: Sequence[str] = (),
    trusts_code: bool = False,
    encoders: bool = False,
    holds_downloads: bool = False,
    below: Sequence[str] = (),
    maps: Mapping[str, str] | None = None,
    file: ConfigFile = NO_FILE,
) -> Settings:
    """Settings from the command line, an environment and the configuration file; what comes first wins.

    Raises UsageError for an empty path and a malformed id, OverlayError in the shell of an overlay that has ended. The
    paths are not looked at.
    """
    chosen = in_force(model_paths, exclude, environ, file, below=below, maps=maps)
    roots = _folders(chosen.model_path.value, "a model path", environ, cwd)
    tiers = _folders(chosen.below.value, "a folder for --below", environ, cwd)
    cache = _absolute(hub_cache(environ), cwd)
    if is_overlay(cache) and not os.path.isdir(cache):
        raise ended(cache, environ)
    return Settings(
        roots=roots,
        hub_cache=cache,
        hf_home=_absolute(hf_home(environ), cwd),
        kind=kind,
        exclude=tuple(chosen.exclude.value),
        trusts_code=trusts_code,
        encoders=encoders,
        holds_downloads=holds_downloads,
        below=tuple(tier for tier in tiers if tier not in roots),
        maps=tuple(_map(name, folder, environ, cwd) for name, folder in chosen.map.value.items()),
    )


def parse_maps(given: Sequence[str]) -> dict[str, str]:
    """The folder for each id, from the command line's `ID=DIR`. Raises UsageError, also for two folders for one id."""
    maps: dict[str, str] = {}
    for text in given:
        name, equals, folder = text.partition("=")
        if not equals:
            raise UsageError(f"a map must be ID=DIR, as in org/name=/data/my-model, not {text!r}")
        if maps.setdefault(name, folder) != folder:
            raise UsageError(f"{name} is mapped to {maps[name]} and to {folder}; leave one of them out")
    return maps


def why_not_mappable(name: str) -> str | None:
    """Why no folder can be mapped to an id, and what to do; None when one can be."""
    _, repo_id = kind_and_id(name)
    if any(part in ("", ".", "..") for part in repo_id.split("/")) or "\\" in repo_id or "\0" in repo_id:
        return f"{name!r} is not an id that a folder can be mapped to; give it as org/name or datasets/org/name"
    return None


def kind_and_id(name: str) -> tuple[str, str]:
    """The kind of repo that an id stands for, `models` or what it begins with, and the id without that."""
    kind, slash, rest = name.partition("/")
    return (kind, rest) if slash and kind in OTHER_KINDS else ("models", name)


def _map(name: str, folder: str, environ: Mapping[str, str], cwd: str) -> Map:
    if (problem := why_not_mappable(name)) is not None:
        raise UsageError(problem)
    kind, repo_id = kind_and_id(name)
    (path,) = _folders([folder], f"the folder for {name}", environ, cwd)
    return Map(kind, repo_id, path)


def _listed(variable: str, environ: Mapping[str, str]) -> list[str]:
    """The paths in an environment variable, separated like PATH."""
    return [part for part in environ.get(variable, "").split(os.pathsep) if part]


def _folders(paths: Sequence[str], what: str, environ: Mapping[str, str], cwd: str) -> tuple[str, ...]:
    """Absolute paths, each once, in order. Raises UsageError for one that is no path."""
    found: dict[str, None] = {}
    for given in paths:
        if not given or "\0" in given:
            raise UsageError(f"{what} is empty or malformed: {given!r}; give a folder")
        found[_absolute(expand_user(given, environ), cwd)] = None
    return tuple(found)


def file_path(environ: Mapping[str, str]) -> str | None:
    """The configuration file: HF_OVERLAY_CONFIG, else where platformdirs puts it; None: none is to be read."""
    if FILE_VARIABLE in environ:
        given = environ[FILE_VARIABLE]
        return os.path.abspath(expand_user(given, environ)) if given else None
    folder = environ.get("XDG_CONFIG_HOME", "").strip()
    if not os.path.isabs(folder):
        folder = expand_user("~/Library/Application Support" if sys.platform == "darwin" else "~/.config", environ)
    return os.path.join(folder, "hf-overlay", "config.toml")


def hf_home(environ: Mapping[str, str]) -> str:
    """HF_HOME as huggingface_hub/constants.py computes it (an empty string is a value, not "unset")."""
    cache_home = environ.get("XDG_CACHE_HOME", os.path.join(expand_user("~", environ), ".cache"))
    return expand(environ.get("HF_HOME", os.path.join(cache_home, "huggingface")), environ)


def hub_cache(environ: Mapping[str, str]) -> str:
    """HF_HUB_CACHE as huggingface_hub/constants.py computes it, the older HUGGINGFACE_HUB_CACHE included."""
    default = environ.get("HUGGINGFACE_HUB_CACHE", os.path.join(hf_home(environ), "hub"))
    return expand(environ.get("HF_HUB_CACHE", default), environ)


def is_overlay(hub_cache: str) -> bool:
    """Whether a path is the hub cache of a session, living or ended, by its name."""
    return hub_cache.endswith("/home/hub") and re.search(_OVERLAY, hub_cache) is not None


def ended(hub_cache: str, environ: Mapping[str, str]) -> OverlayError:
    """The error of a command in a shell whose overlay, with this hub cache, has ended.

    It says how the shell forgets what it got from the overlay. Its HF_HOME is the user's own, and stays.
    """
    names = {"HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HUB_DISABLE_SHARED_BLOBS", "HF_ENDPOINT", "HF_HUB_OFFLINE"}
    verb = "set -e" if os.path.basename(environ.get("SHELL", "")) == "fish" else "unset"
    return OverlayError(
        f"the overlay of this shell has ended ({hub_cache}); start another one (hf-overlay serve) and join it "
        f'(eval "$(hf-overlay env)"), or leave it: {verb} {" ".join(sorted(names & environ.keys()))}'
    )


def working_folder() -> str:
    """The folder that relative paths begin in. Raises OverlayError where it has been removed."""
    try:
        return os.getcwd()
    except FileNotFoundError:
        raise OverlayError("the folder that you are in has been removed; go to another one: cd") from None


def own_folder(environ: Mapping[str, str]) -> str:
    """The folder for what this program makes for itself: in the user's caches, on macOS in Application Support.

    On macOS cleaners empty the caches under running programs, and only shells have XDG variables: a service that
    launchd starts has none, and must use the same folder.
    """
    if sys.platform == "darwin":
        return os.path.join(expand_user("~/Library/Application Support", environ), _NAME)
    return _cache_folder(environ)


def index_folder(environ: Mapping[str, str]) -> str:
    """The folder for what scans found (see catalog.index): beside the sessions, or, with HF_OVERLAY_DIR, in it."""
    return os.path.join(os.path.abspath(environ.get(DIRECTORY_VARIABLE) or own_folder(environ)), "index")


def earlier_folders(environ: Mapping[str, str]) -> tuple[str, ...]:
    """The folders that earlier versions used instead of `own_folder`, and in which they may have left downloads."""
    caches = {_cache_folder(environ): None, _cache_folder({**environ, "XDG_CACHE_HOME": ""}): None}
    return tuple(caches) if sys.platform == "darwin" else ()


def _cache_folder(environ: Mapping[str, str]) -> str:
    """The folder for this program's own caches, where platformdirs puts it, which goes by this process's environment.

    That is XDG_CACHE_HOME if it is an absolute path, else the platform's folder in HOME.
    """
    cache = environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(cache):
        cache = expand_user("~/Library/Caches" if sys.platform == "darwin" else "~/.cache", environ)
    return os.path.join(cache, _NAME)


def is_offline(environ: Mapping[str, str]) -> bool:
    """Whether huggingface_hub will not use the network in this environment (constants.HF_HUB_OFFLINE)."""
    return _is_true(environ.get("HF_HUB_OFFLINE") or environ.get("TRANSFORMERS_OFFLINE"))


def shares_blobs(environ: Mapping[str, str]) -> bool:
    """Whether huggingface_hub 2 shares what it downloads between repos in this environment (_shared_blobs.py)."""
    return not any(_is_true(environ.get(f"HF_HUB_DISABLE_{what}")) for what in ("SHARED_BLOBS", "XET"))


def _is_true(value: str | None) -> bool:
    """Whether huggingface_hub takes the value of a variable for true."""
    return (value or "").upper() in ("1", "ON", "YES", "TRUE")


def applied(variables: Mapping[str, str | None], environ: Mapping[str, str]) -> dict[str, str]:
    """An environment with variables set, or, where the value is None, taken out."""
    changed = {**environ, **variables}
    if "HF_ENDPOINT" in variables:
        changed |= past_proxies(environ)
    return {name: value for name, value in changed.items() if value is not None}


def past_proxies(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables that keep loopback out of an environment's proxy; none where it prescribes no proxy."""
    names = {name.lower() for name, value in environ.items() if value}
    if not names & {"http_proxy", "all_proxy"}:
        return {}
    before = environ.get("no_proxy") or environ.get("NO_PROXY")
    return dict.fromkeys(PROXY_VARIABLES, f"{before},127.0.0.1" if before else "127.0.0.1")


def _absolute(path: str, cwd: str) -> str:
    path = os.path.join(cwd, path)
    # Behind a link `..` is not the textual parent; without one the user's own spelling is what they recognise. What
    # comes after it is not looked at: it may be on a disk that does not answer.
    above, dots, below = f"{path}/".rpartition("/../")
    return os.path.normpath(f"{os.path.realpath(above + dots)}/{below}" if dots else path)


def expand(path: str, environ: Mapping[str, str]) -> str:
    """os.path.expandvars(os.path.expanduser(path)), for the environment handed in."""

    def value(match: re.Match[str]) -> str:
        return environ.get(match[1] or match[2], match[0])

    return re.sub(r"\$(?:(\w+)|\{([^}]*)\})", value, expand_user(path, environ), flags=re.ASCII)


def expand_user(path: str, environ: Mapping[str, str]) -> str:
    """os.path.expanduser, for the environment handed in; `~name` asks the password database."""
    first, slash, rest = path.partition("/")
    if first == "~":
        home = environ["HOME"] if "HOME" in environ else _home_on_record()
        return (home.rstrip("/") + slash + rest) or "/"
    return os.path.expanduser(path)


def _home_on_record() -> str:
    import pwd  # hardly ever asked

    return pwd.getpwuid(os.getuid()).pw_dir
