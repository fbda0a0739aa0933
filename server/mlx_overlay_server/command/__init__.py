"""The commands beside serving. Each one's module is imported only when it is used."""

NAMES = ("ls", "pull", "ps", "bench", "doctor", "config", "key", "service", "completion")
"""The commands, in the order in which the help lists them."""
