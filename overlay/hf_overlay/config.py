"""Where the user's folders are and where huggingface_hub keeps its cache.

Pure functions of the arguments and the environment handed in; nothing here touches huggingface_hub, because it
reads these variables once, when it is imported, and by then the environment must already be ours.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from hf_overlay.errors import UsageError

MODEL_PATH_VARIABLE = "MLX_OMNI_MODEL_PATH"
OWNER_FILE = ".hf-overlay-session"
"""Names the living owner in every session's folder; a scan that meets one knows the folder for ours."""

OLDER_CACHE_VARIABLES = ("TRANSFORMERS_CACHE", "PYTORCH_TRANSFORMERS_CACHE", "PYTORCH_PRETRAINED_BERT_CACHE")
"""Variables that older transformers read before HF_HUB_CACHE."""
PROXY_VARIABLES = ("no_proxy", "NO_PROXY")
CHANGED_VARIABLES = frozenset(
    {
        *OLDER_CACHE_VARIABLES,
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

Kind = Literal["mlx", "any"]
"""`mlx`: models that the installed mlx-lm can load; `any`: also those of transformers, diffusers, …"""

_NAME = "hf-overlay"
_OVERLAY = re.compile(r"/session-\d+-[0-9a-f]+/home/hub$")


class Settings(NamedTuple):
    """Everything an overlay depends on. All paths are absolute; none of them need exist."""

    roots: tuple[str, ...]
    """The user's model folders, most important first; empty: the Hugging Face cache only."""
    hub_cache: str
    """The real cache: what huggingface_hub calls HF_HUB_CACHE."""
    hf_home: str
    """What huggingface_hub calls HF_HOME: tokens, Xet cache, datasets, modules."""
    kind: Kind | None = None
    """The models to take: those that mlx-lm can load, or any; None: `mlx` where mlx-lm is installed, else `any`."""
    exclude: tuple[str, ...] = ()
    """Ids for which the user's folders do not count: the cache, and the Hub, answer."""
    trusts_code: bool = False
    """Also take models whose architecture is in a Python file of their own."""
    holds_downloads: bool = False
    """Download also while the real cache is away or read-only; what comes is held in the session's folder."""


def load(
    model_paths: Sequence[str],
    environ: Mapping[str, str],
    cwd: str,
    *,
    kind: Kind | None = None,
    exclude: Sequence[str] = (),
    trusts_code: bool = False,
    holds_downloads: bool = False,
) -> Settings:
    """Settings from the command line's model paths and an environment; the former win.

    Raises UsageError for an empty path, and in the shell of an overlay that has ended. Model paths are not looked at.
    """
    if not model_paths:
        model_paths = [part for part in environ.get(MODEL_PATH_VARIABLE, "").split(os.pathsep) if part]
    roots: dict[str, None] = {}
    for given in model_paths:
        if not given or "\0" in given:
            raise UsageError(f"a model path is empty or malformed: {given!r}; give a folder of models")
        root = _absolute(expand_user(given, environ), cwd)
        roots[root] = None
    cache = _absolute(hub_cache(environ), cwd)
    if _OVERLAY.search(cache) and not os.path.isdir(cache):
        raise UsageError(f"HF_HUB_CACHE is an overlay that has ended ({cache}); unset HF_HUB_CACHE HF_ENDPOINT first")
    return Settings(
        roots=tuple(roots),
        hub_cache=cache,
        hf_home=_absolute(hf_home(environ), cwd),
        kind=kind,
        exclude=tuple(exclude),
        trusts_code=trusts_code,
        holds_downloads=holds_downloads,
    )


def hf_home(environ: Mapping[str, str]) -> str:
    """HF_HOME as huggingface_hub/constants.py computes it (an empty string is a value, not "unset")."""
    cache_home = environ.get("XDG_CACHE_HOME", os.path.join(expand_user("~", environ), ".cache"))
    return expand(environ.get("HF_HOME", os.path.join(cache_home, "huggingface")), environ)


def hub_cache(environ: Mapping[str, str]) -> str:
    """HF_HUB_CACHE as huggingface_hub/constants.py computes it, the older HUGGINGFACE_HUB_CACHE included."""
    default = environ.get("HUGGINGFACE_HUB_CACHE", os.path.join(hf_home(environ), "hub"))
    return expand(environ.get("HF_HUB_CACHE", default), environ)


def own_folder(environ: Mapping[str, str]) -> str:
    """The folder for what this program makes for itself: in the user's caches, on macOS in Application Support.

    On macOS cleaners empty the caches under running programs, and only shells have XDG variables: a service that
    launchd starts has none, and must use the same folder.
    """
    if sys.platform == "darwin":
        return os.path.join(expand_user("~/Library/Application Support", environ), _NAME)
    return _cache_folder(environ)


def earlier_folders(environ: Mapping[str, str]) -> tuple[str, ...]:
    """The folders that earlier versions used instead of `own_folder`, and in which they may have left downloads."""
    caches = {_cache_folder(environ): None, _cache_folder({**environ, "XDG_CACHE_HOME": ""}): None}
    return tuple(caches) if sys.platform == "darwin" else ()


def _cache_folder(environ: Mapping[str, str]) -> str:
    """The folder for this program's own caches, where platformdirs puts it.

    platformdirs goes by this process's environment. In another one handed in, its rule for a person's own caches is
    followed here: XDG_CACHE_HOME if that is an absolute path, else the platform's folder in HOME.
    """
    if all(environ.get(name) == os.environ.get(name) for name in ("HOME", "XDG_CACHE_HOME")):
        import platformdirs  # only commands that need a session's folder ask

        return platformdirs.user_cache_dir(_NAME, appauthor=False)
    cache = environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(cache):
        cache = expand_user("~/Library/Caches" if sys.platform == "darwin" else "~/.cache", environ)
    return os.path.join(cache, _NAME)


def is_offline(environ: Mapping[str, str]) -> bool:
    """Whether huggingface_hub will not use the network in this environment (constants.HF_HUB_OFFLINE)."""
    value = environ.get("HF_HUB_OFFLINE") or environ.get("TRANSFORMERS_OFFLINE") or ""
    return value.upper() in ("1", "ON", "YES", "TRUE")


def applied(variables: Mapping[str, str | None], environ: Mapping[str, str]) -> dict[str, str]:
    """An environment with variables set, or, where the value is None, taken out."""
    changed = {**environ, **variables}
    if "HF_ENDPOINT" in variables:
        changed |= past_proxies(environ)
    return {name: value for name, value in changed.items() if value is not None}


def past_proxies(environ: Mapping[str, str]) -> dict[str, str]:
    """What keeps loopback out of the proxy that an environment prescribes; nothing where it prescribes none."""
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
