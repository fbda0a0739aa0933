"""A hub in a process of its own, asked by lines of JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.support.loopback_hub.hub import LoopbackHub


def described(spec: Mapping[str, Any]) -> LoopbackHub:
    """A hub from plain data: {"hub": {…}, "repos": [{"repo_id", "files" | "folder", "virtual": {name: size}, …}]}.

    `hub` and what else a repo has are what LoopbackHub and `add_repo` take; `files` are texts here.
    """
    hub = LoopbackHub(**spec.get("hub", {}))
    for repo in map(dict, spec["repos"]):
        virtual = repo.pop("virtual", {})
        texts = repo.pop("files", {})
        folder = repo.pop("folder", None)
        hub.add_repo(files=Path(folder) if folder else {name: text.encode() for name, text in texts.items()}, **repo)
        for name, size in virtual.items():
            hub.add_virtual(repo["repo_id"], name, size, repo_type=repo.get("repo_type", "model"))
    return hub


def main() -> None:
    """`python -m tests.support.loopback_hub SPEC.json`: says its endpoint in a line of JSON, and then serves.

    Each line of stdin is a method and its arguments, {"slow": {"bytes_per_second": 1000}}; it is answered with a line
    of JSON, what the method returned. The end of stdin is the hub's.
    """
    spec = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    with described(spec) as hub:
        print(json.dumps(hub.endpoint), flush=True)
        for line in sys.stdin:
            ((method, arguments),) = json.loads(line).items()
            print(json.dumps(getattr(hub, method)(**arguments)), flush=True)


if __name__ == "__main__":
    main()
