#!/bin/sh
# A model in a plain folder, and an unmodified mlx_lm that finds it by its id. $1: the environment's bin folder.
set -eu
bin=$(cd "$1" && pwd)
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
show() { printf '\n$ %s\n' "$*"; }

"$bin/python" -c "
from pathlib import Path
from tests.support.models import make_model
make_model(Path('$place/models/acme/tiny'), 'Hello from your own folder.')
"
export HF_HUB_OFFLINE=1 HF_HUB_DISABLE_UPDATE_CHECK=1
cd "$place"

show hf-overlay ls --model-path models
"$bin/hf-overlay" ls --model-path models

show 'hf-overlay run --model-path models -- python -m mlx_lm generate --model acme/tiny --prompt Hi'
"$bin/hf-overlay" run --model-path models -- "$bin/python" -m mlx_lm generate --model acme/tiny --prompt Hi

cat <<'TEXT'

Now with yours:
  . .venv/bin/activate
  hf-overlay ls --model-path /Volumes/LLMS/models
  hf-overlay run --model-path /Volumes/LLMS/models -- python my_script.py
TEXT
