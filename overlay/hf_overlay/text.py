"""Text for a terminal."""


def printable(text: str) -> str:
    """Names on disk may hold anything; control characters must not reach a terminal, nor lone bytes an encoder."""
    return "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape", "surrogatepass").decode() for c in text
    )
