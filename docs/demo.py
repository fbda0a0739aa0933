"""A model in a plain folder, the server on it, and the OpenAI SDK that chats with it; then how to go on."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the tests' model maker

from tests.support.models import make_model

MODEL = "acme/tiny"
NEXT = """
Now with yours:
  make serve MODEL_PATH=/Volumes/LLMS/models
which has a page for your models, with a chat to try them: http://127.0.0.1:10240
or
  . .venv/bin/activate
  mlx-omni-server --model-path /Volumes/LLMS/models
  hf-overlay run --model-path /Volumes/LLMS/models -- mlx_lm.generate --model org/name --prompt hi
"""


def main() -> int:
    """Run the demo; everything it makes is in a temporary folder."""
    with tempfile.TemporaryDirectory() as place:
        models = Path(place, "models")
        make_model(models / MODEL, "Hello from your own folder.")
        step(f"a tiny model in a plain folder: models/{MODEL}", " ".join(sorted(os.listdir(models / MODEL))))
        command = [sys.executable, "-P", "-m", "mlx_overlay_server", "--model-path", str(models)]
        command += ["--port", "0", "--offline"]
        step("mlx-omni-server --model-path models")
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        try:
            url = listening(process)
            step(f"curl {url}/v1/models", *ids(url))
            step(f"the openai SDK: chat with {MODEL}", chat(url))
        finally:
            process.terminate()
            process.communicate(timeout=60)
    print(NEXT)
    return 0


def listening(process: subprocess.Popen[str]) -> str:
    """The server's address, once it says it."""
    assert process.stderr is not None
    for line in process.stderr:
        print("  " + line, end="")
        if found := re.search(r"listening on (\S+)", line):
            return found[1]
    raise SystemExit("the server did not start")


def ids(url: str) -> list[str]:
    """What the server lists."""
    import openai

    return [model.id for model in openai.OpenAI(base_url=f"{url}/v1", api_key="none").models.list()]


def chat(url: str) -> str:
    """What the model answers, streamed."""
    import openai

    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
    chunks = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "Where are you?"}], stream=True
    )
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)


def step(what: str, *result: str) -> None:
    """Show what is done, and what comes of it."""
    print(f"\n$ {what}", *(f"  {line}" for line in result), sep="\n", flush=True)


if __name__ == "__main__":
    sys.exit(main())
