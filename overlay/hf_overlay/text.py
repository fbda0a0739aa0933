"""Text for a terminal."""


def printable(text: str) -> str:
    """The text with control characters, and bytes that are not text, replaced by escapes such as `\\x1b`.

    Names on disk may hold either. The former must not reach a terminal, where a line's end would begin a false line;
    the latter cannot be encoded.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)
