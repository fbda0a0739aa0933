"""The values of options on the command line: argparse calls these functions, and shows what they raise."""

from __future__ import annotations

from argparse import Action, ArgumentError, ArgumentTypeError, Namespace
from typing import Any

from mlx_overlay_server import settings


class Pairs(Action):
    """Collects pairs of a name and a value from a repeated option. To give one name two values is a mistake."""

    def __call__(self, _parser: object, namespace: Namespace, values: Any, _flag: object = None) -> None:
        """Add a pair to those before it."""
        name, value = values
        before = getattr(namespace, self.dest)
        if (other := dict(before).get(name, value)) != value:
            raise ArgumentError(self, f"{name} is {other} and {value}; leave one of them out")
        setattr(namespace, self.dest, [*before, values])


def alias(text: str) -> tuple[str, str]:
    """Return the two parts of NAME=ID."""
    return _pair(text, "an alias; give it as NAME=ID")


def map_(text: str) -> tuple[str, str]:
    """Return the two parts of ID=DIR."""
    return _pair(text, "a map; give it as ID=DIR")


def _pair(text: str, kind: str) -> tuple[str, str]:
    left, _, right = text.partition("=")
    if not (left and right):
        raise ArgumentTypeError(f"{text!r} is not {kind}")
    return left, right


def origins(text: str) -> list[str]:
    """Return the origins of web pages, which commas separate."""
    return [origin.strip() for origin in text.split(",") if origin.strip()]


def size(text: str) -> int:
    """Return the bytes of a size such as `24G`."""
    try:
        return settings.size(text)
    except (ValueError, OverflowError):
        raise ArgumentTypeError(f"{text!r} is not a size; give it as 24G or 512M") from None


def port(text: str) -> int:
    """Return the number of a TCP port; 0 stands for any free one."""
    if not text.isdecimal() or int(text) > 65535:
        raise ArgumentTypeError(f"{text!r} is not a port (0 to 65535)")
    return int(text)


def count(text: str) -> int:
    """Return a whole number, 0 or more."""
    if not text.isdecimal():
        raise ArgumentTypeError(f"{text!r} is not a whole number")
    return int(text)


def positive(text: str) -> int:
    """Return a whole number, 1 or more."""
    if (number := count(text)) < 1:
        raise ArgumentTypeError("must be at least 1")
    return number


def seconds(text: str) -> float:
    """Return a number of seconds, 0 or more."""
    try:
        number = float(text)
    except ValueError:
        number = -1
    if not 0 <= number < float("inf"):
        raise ArgumentTypeError(f"{text!r} is not a number of seconds")
    return number
