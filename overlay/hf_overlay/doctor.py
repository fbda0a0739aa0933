"""Diagnoses problems and suggests fixes, for `hf-overlay doctor`. Reads disks, and leaves nothing behind on them."""

import os
import shlex
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from importlib import metadata
from typing import NamedTuple

from hf_overlay import config, hfcache, keeping
from hf_overlay.catalog.catalog import Catalog
from hf_overlay.catalog.files import BROKEN, Unfit, contents, list_folder
from hf_overlay.catalog.plan import fold, resolve
from hf_overlay.errors import SessionError
from hf_overlay.messages import Messages
from hf_overlay.models import Code, Reject
from hf_overlay.patience import NoAnswer
from hf_overlay.tree import files, held, lease

FULL_BYTES = 2**30
"""With fewer free bytes than this in the real cache, the next download of a model fails."""
_SAFE_HUB = (1, 32)
"""The first huggingface_hub whose deletions do not follow links to their end (utils/_cache_manager.py)."""


_COPY = "Wait for the copy to end, or copy the files named again."
_PERMISSION = "Give yourself read permission (macOS: System Settings, Privacy & Security, Files and Folders)."
_KIND = "Update mlx-lm if it is new; for other programs use --kind any."
_CONFIG = "Copy or download config.json and the weights again."
_GGUF = "GGUF is for llama.cpp and Ollama. For mlx-lm and transformers, download the model's safetensors version."
_AWAY = "It is left out, so that no private file is handed out. Copy the file here if the model needs it."
_OTHER = "If this should be a model, correct that; else there is nothing to do."
ADVICE: Mapping[Code, str] = {
    Code.EXCLUDED: _OTHER,
    Code.MISSING: _OTHER,
    Code.NO_PERMISSION: _PERMISSION,
    Code.UNREADABLE: "Check the drive, or the link that leads there, and try again.",
    Code.NO_ANSWER: "Check the drive or its server, or unmount it; its models are back as soon as it answers.",
    Code.NOT_A_FOLDER: _OTHER,
    Code.IS_A_MODEL: "Give the folder above it as model path.",
    Code.IS_THE_CACHE: "Leave out this model path.",
    Code.BAD_NAME: "Rename the folder.",
    Code.LINK_TO_PARENT: _OTHER,
    Code.LINKED_TWICE: _OTHER,
    Code.TOO_DEEP: _OTHER,
    Code.NO_CONFIG: _CONFIG,
    Code.GGUF: f"{_GGUF} For llama.cpp, use --kind any.",
    Code.BAD_CONFIG: _CONFIG,
    Code.OTHER_KIND: _KIND,
    Code.NO_WEIGHTS: _OTHER,
    Code.BROKEN_LINK: "Connect the drive that it leads to, or copy the file again.",
    Code.INCOMPLETE: _COPY,
    Code.NO_SNAPSHOT: "Download the model again if it should load by its id; otherwise nothing to do.",
}
"""Code of a rejected folder -> advice on what to do about it."""


class Finding(NamedTuple):
    """One problem, and what to do about it."""

    kind: str
    """A word for programs, such as `rejected` or `duplicate`."""
    where: str
    """The path or program that has the problem."""
    what: str
    advice: str


def examine(catalog: Catalog, environ: Mapping[str, str]) -> list[Finding]:
    """Return the findings of every check: folders, ids, the volume of sessions, cache, installation, dead sessions."""
    sessions = lease.sessions_folder(environ)
    silent = [folder for folder in lease.all_sessions_folders(environ) if not catalog.answers(folder)]
    answering = [folder for folder in lease.all_sessions_folders(environ) if folder not in silent]
    return [
        *_folders(catalog),
        *_ids(catalog),
        *(Finding("sessions", folder, "does not answer", ADVICE[Code.NO_ANSWER]) for folder in silent),
        *(_sessions_volume(sessions) if sessions in answering else ()),
        *_cache(catalog),
        *_deletions(),
        *(finding for folder in answering for finding in _stale(folder)),
    ]


def _folders(catalog: Catalog) -> Iterator[Finding]:
    for source in (*catalog.sources, *catalog.below):
        if source.problem is not None:
            yield Finding(
                "source",
                source.root,
                source.problem.text,
                ADVICE[source.problem.code]
                if source.problem.code is Code.NO_ANSWER
                else "Connect the drive or correct the path; it is used once it is there.",
            )
        for reject in source.rejects:
            yield _rejected(reject)
        if source.junk:
            yield Finding(
                "appledouble",
                source.root,
                f"{source.junk} AppleDouble files (._name), which macOS writes on exFAT and network volumes",
                f"They are left out here; other programs may trip over them. Remove them: dot_clean -m "
                f"{shlex.quote(source.root)}",
            )
        found = [model.path for model in source.models]
        found += [reject.path for reject in source.rejects if reject.id is not None]
        try:
            yield from catalog.patience.ask(source.root, partial(_links, found))
            yield from catalog.patience.ask(source.root, partial(_ollama, source.root))
        except NoAnswer:
            pass  # the checks above have found that


def _links(found: Sequence[str]) -> list[Finding]:
    """Return findings about links in model folders that do not count, which no list of models mentions."""
    findings = []
    for folder in found:
        try:
            left_out = contents(folder, list_folder(folder)).left_out
        except (Unfit, OSError):  # the link is the reason why the folder is rejected
            continue
        for name, why in left_out.items():
            advice = ADVICE[Code.BROKEN_LINK] if why == BROKEN else _AWAY
            findings.append(Finding("link", f"{folder}/{name}", f"{why} ({_target(f'{folder}/{name}')})", advice))
    return findings


def _target(link: str) -> str:
    try:
        return os.readlink(link)
    except OSError:  # a file in a folder that is a link
        return os.path.realpath(link)


def _ollama(root: str) -> list[Finding]:
    """Return findings about Ollama's stores in a model path; their files are named by digests."""
    return [
        Finding("ollama", folder, "holds models of Ollama, as blobs that no other program loads", _GGUF)
        for folder in (root, *_subfolders(root))
        if os.path.isdir(f"{folder}/manifests")
        and any(name.startswith("sha256-") for name in _names(f"{folder}/blobs"))
    ]


def _names(folder: str) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []


def _subfolders(folder: str) -> list[str]:
    return [path for name in _names(folder) if os.path.isdir(path := f"{folder}/{name}")]


def _rejected(reject: Reject) -> Finding:
    return Finding("rejected", reject.path, reject.reason.text, ADVICE[reject.reason.code])


def _ids(catalog: Catalog) -> Iterator[Finding]:
    resolutions = resolve(catalog.sources)
    for model_id, resolution in resolutions.items():
        if (reason := hfcache.why_not_linkable(model_id)) is not None:
            yield Finding(
                "id",
                resolution.winner.path,
                f"its id {model_id} {reason}",
                _by_path(model_id, "Rename the folder, or load it"),
            )
        elif (reason := hfcache.why_not_hub_id(model_id)) is not None:
            yield Finding(
                "id",
                resolution.winner.path,
                f"its id {model_id} {reason}; it is listed, but Hub clients refuse to load it",
                _by_path(model_id, "Load it"),
            )
        for hidden in resolution.shadows:
            yield Finding(
                "duplicate",
                hidden.path,
                f"{model_id} is also in {resolution.winner.path}, which comes first",
                "Keep one of them, or give the model paths in the other order.",
            )
    spelled: dict[str, str] = {}
    for model_id, resolution in resolutions.items():
        other = spelled.setdefault(fold(model_id), model_id)
        if other != model_id:
            yield Finding(
                "case",
                resolution.winner.path,
                f"{model_id} and {other} differ in case only",
                "On a case-insensitive volume (macOS) only the first can stand in the overlay: rename one folder.",
            )


def _by_path(model_id: str, start: str) -> str:
    return f'{start} by path: --model "$(hf-overlay path {shlex.quote(model_id)})"'


def _sessions_volume(sessions: str) -> Iterator[Finding]:
    folder = sessions
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    elsewhere = f"Set {config.DIRECTORY_VARIABLE} to a folder on a volume that takes symbolic links and has room."
    try:
        with tempfile.TemporaryDirectory(prefix=".hf-overlay-probe-", dir=folder) as probe:
            os.symlink("target", f"{probe}/link")
    except OSError as error:
        yield Finding("symlinks", sessions, f"no symbolic link can be made there: {error.strerror}", elsewhere)


def _cache(catalog: Catalog) -> Iterator[Finding]:
    hub = catalog.settings.hub_cache
    try:
        findings = catalog.patience.ask(hub, partial(_cache_volume, hub))
    except NoAnswer:
        yield Finding("cache", hub, "the Hugging Face cache does not answer", ADVICE[Code.NO_ANSWER])
        return
    yield from findings
    catalog.real_cache.entries()
    for path, reason in catalog.real_cache.unscannable.items():
        yield Finding(
            "cache",
            path,
            f"makes every scan of the plain cache fail: {reason}",
            "Left out here. Download that model again.",
        )
    for reject in catalog.real_cache.models().rejects:
        yield _rejected(reject)


def _cache_volume(hub: str) -> list[Finding]:
    return list(_volume_findings(hub))


def _volume_findings(hub: str) -> Iterator[Finding]:
    problem = keeping.problem(hub)
    if problem is not None and (problem.kind == "away" or not os.path.exists(hub)):
        advice = f"{_sentence(problem.advice)} Until then it shows no models, and nothing is downloaded."
        yield Finding("cache", hub, f"the Hugging Face cache {problem.text}", advice)
    if not os.path.exists(hub):
        return
    if not os.path.isdir(hub):
        yield Finding("cache", hub, "the Hugging Face cache is not a folder", "Correct HF_HUB_CACHE or HF_HOME.")
        return
    if problem is not None:
        advice = f"{_sentence(problem.advice)} Until then models load, and nothing is downloaded."
        yield Finding("cache", hub, f"the Hugging Face cache {problem.text}", advice)
    space = os.statvfs(hub)
    if space.f_bavail * space.f_frsize < FULL_BYTES:
        yield Finding(
            "cache",
            hub,
            f"only {space.f_bavail * space.f_frsize // 10**6} MB are free for downloads",
            "Make room (hf cache ls --sort size), or move it with HF_HOME.",
        )


def _deletions() -> Iterator[Finding]:
    try:
        version = metadata.version("huggingface_hub")
    except metadata.PackageNotFoundError:
        return
    if tuple(int(part) for part in version.split(".")[:2]) < _SAFE_HUB:
        yield Finding(
            "deletions",
            f"huggingface_hub {version}",
            "its cache deletions follow links to the end; the overlay is built so that they find nothing of yours, "
            "but links that you put into a cache yourself are not safe",
            "Update it: pip install -U huggingface_hub",
        )


def _stale(sessions: str) -> Iterator[Finding]:
    try:
        paths = lease.sessions_in(sessions, Messages())
    except SessionError as error:
        yield Finding("sessions", sessions, str(error), f"Set {config.DIRECTORY_VARIABLE} to a folder of your own.")
        return
    for path in paths:
        if payloads := _held(sessions, path):
            names = ", ".join(f"{name} ({size / 1e6:.1f} MB)" for name, size in payloads)
            advice = "It moves to the cache at the next start that can; to try now: hf-overlay clean."
            yield Finding("held", path, f"holds downloads that the cache could not take: {names}", advice)
            continue
        with lease.dead(sessions, path) as is_dead:
            if is_dead:
                yield Finding("session", path, "left behind by a program that was killed", "Clear it: hf-overlay clean")


def _held(sessions: str, path: str) -> list[tuple[str, int]]:
    """Return the repos whose downloads a dead session holds back, each with its bytes; nothing for a living session."""
    fd = lease.share(sessions, path)
    if fd is None:
        return []
    try:
        return [(os.path.basename(repo), files.size(repo)) for repo in held.payloads(path)]
    finally:
        os.close(fd)


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."
