"""How many tokens a pass over prompts may read, so that decoding sequences do not wait for it longer than is wanted.

It is learnt from passes as they go, so that it fits a laptop's processor as well as a large GPU.
"""

from __future__ import annotations

_FIRST = 64
"""Tokens of a pass before anything was measured."""
_LEAST = 16
"""Tokens of a pass however slow the machine is: where they take longer than is wanted, fewer would not help much."""
_MARGIN = 0.9
"""Share of the time that a pass is planned to take: the next may be slower than the last."""
_HALF_CONTEXT = 8192
"""Tokens after which a pass may read half of the most: attention takes memory for each that comes before."""
_PAYS = 5
"""A pass may take so many times as long as one over a single token, even where that is longer than is wanted."""
_BAND = 1024
"""Contexts that are within so many tokens of each other, or twice as long at most, count as equally slow."""


class Pace:
    """What is known of a model's speed on this machine."""

    def __init__(self, most: int, stall: float) -> None:
        """`most`: tokens of a pass, whatever the time; `stall`: seconds that decoding sequences may wait."""
        self._most = most
        self._wanted = _MARGIN * stall
        self._decode = 0.0
        """Seconds of a step beside reading, lately: each sequence gets a token, and what was read joins the batch."""
        self._least = 0.0
        """The same with one sequence alone: every pass takes as long at the least, for it goes through all weights."""
        self._rates: dict[int, float] = {}
        """Band of contexts -> tokens read per second, lately."""

    def room(self, context: int, *, is_decoding: bool) -> int:
        """Return how many tokens a pass may read after so many others; `is_decoding`: whether sequences wait for it.

        When none does, a pass may take four times as long: only requests that come meanwhile wait for it.
        """
        most = max(1, self._most * _HALF_CONTEXT // (_HALF_CONTEXT + context))
        rate = self._rate(_band(context))
        wanted = _FIRST if rate is None else int(rate * self._seconds(is_decoding=is_decoding))
        return min(most, max(_LEAST, wanted))

    def note_decode(self, seconds: float, sequences: int) -> None:
        """Learn from a step that drew a token for each of some sequences, and took so long beside what it read."""
        self._decode = _lately(self._decode, seconds)
        if sequences == 1:
            self._least = _lately(self._least, seconds)

    def note_read(self, size: int, context: int, seconds: float) -> None:
        """Learn from a pass that read `size` tokens, padding included, after `context` others."""
        if size < _LEAST // 2:  # its seconds are not those of its tokens, and the very first pass compiles
            return
        band, rate = _band(context), size / max(seconds, 1e-6)
        known = self._rates.get(band, rate)
        if rate >= known:
            self._rates[band] = (known + rate) / 2
        elif size >= 0.9 * self.room(context, is_decoding=True) or seconds > self._seconds(is_decoding=True):
            self._rates[band] = rate  # and not after a smaller pass, which is slow for its size
            if rate < known / 2:  # it is the machine that has become slower
                self._rates = {each: min(other, other * rate / known) for each, other in self._rates.items()}
                self._rates[band] = rate

    def _seconds(self, *, is_decoding: bool) -> float:
        """Return how long a pass may take.

        Where decoding takes more than half of the time that is wanted, as many sequences do on a slow machine, reading
        takes as long as decoding: else each prompt would be read in many small passes, with a decoding step for each.
        Likewise a pass takes several times as long as the smallest would, however long that is: as much as the
        smallest is not for its tokens, but for going through the model's weights.
        """
        if not is_decoding:
            return 4 * self._wanted
        return max(self._wanted - self._decode, self._decode, _PAYS * self._least)

    def _rate(self, band: int) -> float | None:
        """Return the rate of a band of contexts: its own, or half of the next shorter one's."""
        shorter = max((each for each in self._rates if each <= band), default=None)
        if shorter is not None:
            return self._rates[shorter] * 0.5 ** (band - shorter)
        return next(iter(self._rates.values()), None)


def _lately(known: float, seconds: float) -> float:
    return (known + seconds) / 2 if known else seconds


def _band(context: int) -> int:
    return (context // _BAND).bit_length()
