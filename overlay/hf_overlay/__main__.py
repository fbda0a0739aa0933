"""`python -m hf_overlay` is the command `hf-overlay`."""

from hf_overlay.command.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
