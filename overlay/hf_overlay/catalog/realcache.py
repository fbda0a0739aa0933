"""The real cache as a catalog sees it: its models, what of it an overlay can show, and whether it keeps downloads."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from functools import partial

from hf_overlay import hfcache, keeping
from hf_overlay.catalog.files import reason_of
from hf_overlay.catalog.memo import Memo
from hf_overlay.catalog.plan import Entry
from hf_overlay.catalog.repos import Checked, examine_all
from hf_overlay.catalog.scan import Scanner
from hf_overlay.errors import OverlayError, SessionError
from hf_overlay.models import CachedRepo, Code, Model, Source
from hf_overlay.patience import NoAnswer, Patience


class RealCache:
    """The real cache, looked at anew by each call; what has not changed is remembered."""

    def __init__(self, hub: str, scanner: Scanner, patience: Patience) -> None:
        self._hub = hub
        self._scanner = scanner
        self._patience = patience
        self._examined: Memo[Checked] = Memo()
        self._repos: Memo[CachedRepo] = Memo()
        self._problem: str | None = None
        """Why nothing in it can be seen."""
        self._not_kept: str | None = None
        """Why it keeps no download."""
        self.unscannable: dict[str, str] = {}
        """Repos that were left out because one of them makes every cache scan fail: path -> why."""

    def models(self) -> Source:
        """Its models, from a scan made now."""
        cache = self._scanner.scan_cache()
        self._judge(cache.problem.text if cache.problem is not None else None)
        return cache

    def has(self, model_id: str) -> bool:
        """Whether it holds a loadable copy now; False while nothing tells what mlx-lm loads."""
        try:
            return isinstance(self._scanner.read_cached(model_id), Model)
        except SessionError:
            raise
        except OverlayError:
            return False

    def entries(self, in_tiers: Collection[str] = ()) -> list[Entry]:
        """Its entries that an overlay can show. The rest is in `unscannable` afterwards.

        Of repos that tiers hold as well, by their names, all that they hold is read.
        """
        memo, repos_memo = self._examined.next_round(), self._repos.next_round()
        problem = None
        try:
            examined, self._examined, self._repos = self._patience.ask(
                self._hub, partial(examine_all, self._hub, memo, self._scanner.held, frozenset(in_tiers), repos_memo)
            )
        except OSError as error:
            problem = _text_of(error)
            examined = [Checked(Entry(name, path), None) for name, path in self._scanner.held.items()]
        self._judge(problem)
        self.unscannable = {each.entry.path: each.problem for each in examined if each.problem is not None}
        entries = [each.entry for each in examined if each.problem is None]
        if self._not_kept is not None:  # clients cannot write to the locks; they make a folder of their own
            entries = [entry for entry in entries if entry.name != hfcache.LOCKS]
        return entries

    def why_not_kept(self) -> keeping.Problem | None:
        """Why it keeps no download now; None when it does."""
        try:
            return self._patience.ask(self._hub, partial(keeping.problem, self._hub))
        except NoAnswer:
            return keeping.Problem("unusable", "does not answer", "check its drive or server, or unmount it")

    def warnings(self, downloads: str | None) -> Iterator[str]:
        """Warnings about it, as of the last look; `downloads` says what becomes of them, None where there are none."""
        end = f"; {downloads}" if downloads is not None else ""
        if self._problem is not None:
            yield f"Hugging Face cache {self._hub} {self._problem}; going on without it{end}"
        elif self._not_kept is not None and downloads is not None:
            yield f"Hugging Face cache {self._hub} {self._not_kept}{end}"
        for path, reason in self.unscannable.items():
            yield f"{path} would make every scan of the cache fail ({reason}); it is left out"

    def _judge(self, problem: str | None) -> None:
        """Note what warnings say, when the cache could not be read for the reason `problem`."""
        found = self.why_not_kept()
        if found is not None and found.kind == "away":
            problem = f"is away: it {found.text}; {found.advice}"
        self._problem = problem
        self._not_kept = found.text if found is not None else None


def _text_of(error: OSError) -> str:
    reason = reason_of(error)
    return reason.text if reason.code is Code.NO_ANSWER else f"cannot be read: {error.strerror}"
