"""`python -m mlx_overlay_server` is the command `mlx-omni-server`."""

import logging

from mlx_overlay_server.cli import main

if __name__ == "__main__":
    logging.captureWarnings(True)
    raise SystemExit(main())
