"""What a session tells people: by Python's `logging`, for programs that have set that up.

A command prints it as lines of its own instead. To import `logging` takes as long as all else that `hf-overlay run`
does at its start without models.
"""

from __future__ import annotations


class Messages:
    """Hands all that a session tells to the logger of this package. Safe to use from several threads."""

    @property
    def are_detailed(self) -> bool:
        """Whether anybody sees details, which may take a while to find out."""
        import logging

        return logging.getLogger("hf_overlay").isEnabledFor(logging.DEBUG)

    def debug(self, text: str) -> None:
        """Tell a detail."""
        import logging

        logging.getLogger("hf_overlay").debug("%s", text)

    def info(self, text: str) -> None:
        """Tell what is going on."""
        import logging

        logging.getLogger("hf_overlay").info("%s", text)

    def warning(self, text: str) -> None:
        """Tell what is wrong, although it goes on."""
        import logging

        logging.getLogger("hf_overlay").warning("%s", text)
