"""`hf-overlay extension`: the command `hf overlay …`, by an entry among the extensions of the `hf` command."""

from __future__ import annotations

import json
import os
import sys
import sysconfig
from collections.abc import Mapping
from datetime import UTC, datetime

from hf_overlay.config import expand_user
from hf_overlay.errors import OverlayError

_FOLDER = "~/.local/share/hf/extensions/hf-overlay"
"""Where huggingface_hub/cli/extensions.py looks for `hf overlay`; no variable moves it."""
_OWNER = "_local"
"""In place of a GitHub account: no account can have this name, so `hf extensions update` never replaces ours."""


def register(environ: Mapping[str, str]) -> str:
    """Make `hf overlay …` run this installation's hf-overlay; returns the path of the file that says so.

    `hf extensions remove overlay` takes it back. Raises OverlayError when another extension of that name is installed,
    the command is not there, or the file cannot be written.
    """
    command = executable()
    folder = expand_user(_FOLDER, environ)
    manifest = f"{folder}/manifest.json"
    if os.path.exists(folder) and _owner(manifest) != _OWNER:
        raise OverlayError(f"{folder} holds another extension; remove it first: hf extensions remove overlay")
    entry = {
        "owner": _OWNER,
        "repo": "hf-overlay",
        "repo_id": f"{_OWNER}/hf-overlay",
        "short_name": "overlay",
        "executable_path": command,
        "type": "binary",
        "installed_at": datetime.now(UTC).isoformat(),
        "description": "Your model folders in front of the Hugging Face cache",
    }
    try:
        os.makedirs(folder, exist_ok=True)
        with open(manifest, "w", encoding="utf-8") as file:
            json.dump(entry, file, indent=2)
    except OSError as error:
        raise OverlayError(f"cannot write {manifest}: {error.strerror}; make that folder writable") from error
    return manifest


def executable() -> str:
    """The path of the command hf-overlay: as it was started just now, else the one of this Python environment.

    Raises OverlayError where there is none, as when the package was not installed.
    """
    installed = os.path.join(sysconfig.get_path("scripts"), "hf-overlay")
    for path in (os.path.abspath(sys.argv[0]), installed):
        if os.path.basename(path) == "hf-overlay" and os.path.isfile(path):
            return path
    raise OverlayError(f"there is no {installed}; install hf-overlay in this environment (pip install hf-overlay)")


def _owner(manifest: str) -> object:
    try:
        with open(manifest, encoding="utf-8") as file:
            return json.load(file).get("owner")
    except (OSError, ValueError, AttributeError):
        return None
