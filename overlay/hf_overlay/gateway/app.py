"""The gateway's answers: its own about a user's model, and the real Hub's about everything else.

This is apart from `server`, which starts without the libraries that this module needs.
"""

from __future__ import annotations

import hmac
import re
import threading
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from hf_overlay import hfcache
from hf_overlay.gateway import routes
from hf_overlay.gateway.exchange import Answer, Request
from hf_overlay.gateway.hub import Hub, Unavailable
from hf_overlay.gateway.routes import Target
from hf_overlay.hfcache import LinkedRepo

if TYPE_CHECKING:
    from hf_overlay.gateway.upstream import Upstream

_OF_A_GATEWAY = re.compile(r"/[0-9a-f]{40}$")
_ENDED = "the overlay that this program was started in has ended; start it again in one that is open (hf-overlay env)"
_OUTER_ENDED = "the overlay that hf-overlay was started in has ended; start it again in another shell (hf-overlay env)"


class App:
    """Answers the requests of programs. Any number of threads may use it at once."""

    def __init__(self, hub: Hub, upstream: str, endpoint: str) -> None:
        """`upstream` is the real Hub's URL; `endpoint` is the gateway's own, whose path is a secret."""
        self._hub = hub
        self._url = upstream
        self._endpoint = endpoint
        self._prefix = urlsplit(endpoint).path
        self._upstream: Upstream | None = None
        self._making = threading.Lock()

    def close(self) -> None:
        """Close the connections to the real Hub."""
        if self._upstream is not None:
            self._upstream.close()

    def respond(self, request: Request) -> Answer:
        """Return the answer to a request."""
        prefix, path = request.path[: len(self._prefix)], request.path[len(self._prefix) :]
        if not hmac.compare_digest(prefix, self._prefix) or not path.startswith("/"):
            if _OF_A_GATEWAY.match(prefix):  # for a program of another gateway, whose port this one has got
                return routes.error(404, "RepoNotFound", _ENDED)
            return routes.error(404, "EntryNotFound", "no such page")
        target, found = self._find(path, request.method)
        if target is None or found is None:
            return self._pass_on(request, path, target)
        if isinstance(found, Unavailable):
            return routes.not_now(target, found.message, has_copy=found.has_copy)
        return routes.answer(request, target, found.model, found.commit, self._hub.ask)

    def _find(self, path: str, method: str) -> tuple[Target | None, LinkedRepo | Unavailable | None]:
        """Return the repo that a request path names, and the user's model that answers for it, or why nobody may."""
        target = routes.parse(path, lambda model_id: self._hub.refresh_and_find(model_id) is not None)
        found = self._hub.refresh_and_find(target.repo_id, target.kind) if target is not None else None
        if found is None and target is not None and target.precedes_download(method):
            found = self._hub.refuse_download(target.repo_id, target.folder)
        if isinstance(found, LinkedRepo) and target is not None and target.precedes_writing(method):
            self._hub.expect_download(hfcache.repo_folder(found.model.id, found.model.kind))
        return target, found

    def _pass_on(self, request: Request, path: str, target: Target | None) -> Answer:
        from hf_overlay.gateway import upstream  # imported here, because answers about the user's models do not need it

        try:
            answer = self._real_hub().send(request, path)
        except upstream.Unreachable as error:
            # the shell that this overlay was started from had joined another overlay
            was_a_gateway = _OF_A_GATEWAY.search(self._url)
            return routes.error(504, "", _OUTER_ENDED if was_a_gateway else str(error))
        # clients also note in their cache which files a repo lacks
        is_there = answer.status < 400 or answer.header("x-repo-commit") is not None
        if target is not None and target.precedes_writing(request.method) and is_there:
            self._hub.expect_download(target.folder, _xet_hashes(answer))
        return answer

    def _real_hub(self) -> Upstream:
        from hf_overlay.gateway.upstream import Upstream

        with self._making:
            if self._upstream is None:
                self._upstream = Upstream(self._url, self._endpoint)
            return self._upstream


def _xet_hashes(answer: Answer) -> dict[str, str]:
    """Return the Xet hash of a file by its etag, if the Hub's answer about the file has one."""
    etag, xet_hash = (answer.header(name) or "" for name in ("x-linked-etag", "x-xet-hash"))
    return {etag.removeprefix("W/").strip('"'): xet_hash} if etag and xet_hash else {}
