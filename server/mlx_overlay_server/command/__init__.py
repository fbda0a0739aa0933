"""The commands beside serving. Each one's module is imported only when it is used."""

NAMES = ("ls", "pull", "ps", "stop", "bench", "doctor", "config", "key", "service", "launch", "completion")
"""The commands, in the order in which the help lists them."""
