"""The command `hf-overlay`."""
