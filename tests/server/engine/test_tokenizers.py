"""The server's process has only the part of a tokenizer that turns answers into text, and imports nothing for more."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.tokenizer_utils import load
from mlx_overlay_server.engine import mlx_tokenizers, tokenizers
from mlx_overlay_server.engine.failures import Unreadable, load_failure

from tests.support.models import make_model
from tests.support.spaces import KINDS, make_tokenizer

_WITHOUT = """
import sys
from mlx_overlay_server.imports import UNUSED, left_out
with left_out(*UNUSED):
    from mlx_overlay_server.engine import mlx
    import mlx_overlay_server.engine.loading
assert not [name for name in sys.modules if name.partition(".")[0] in UNUSED]
from transformers import AutoTokenizer
assert AutoTokenizer.__module__ == "transformers.models.auto.tokenization_auto"
"""

_ONCE = """
import collections, sys
from importlib import util
opened = collections.Counter()
sys.addaudithook(lambda event, arguments: event == "open" and opened.update([str(arguments[0])]))
from mlx_overlay_server.imports import import_transformers
import_transformers()
import transformers
assert transformers.LlamaConfig.model_type == "llama"
assert transformers.models.llama.LlamaConfig is transformers.LlamaConfig
models = [file for file in opened if "/transformers/models/" in file and file.endswith(".py")]
assert not [file for file in models if opened[file] > 1]

from transformers.utils import import_utils as changed
spec = util.spec_from_file_location("transformers.utils.own", changed.__file__)
sys.modules[spec.name] = own = util.module_from_spec(spec)
spec.loader.exec_module(own)
path = transformers.models.__file__
assert changed.fetch__all__ is not own.fetch__all__
assert changed.define_import_structure(path) == own.define_import_structure(path)
"""


@pytest.mark.parametrize("program", [_WITHOUT, _ONCE], ids=["mlx-lm without transformers", "transformers"])
def test_imports_leave_out_what_takes_time(program: str) -> None:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module", params=KINDS)
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp(request.param) / "model"
    make_tokenizer(folder, request.param)
    return load(folder)


@settings(max_examples=50)
@given(data=st.data())
def test_the_part_says_what_the_whole_says(whole: Any, data: st.DataObject) -> None:
    read = tokenizers.cut(tokenizers.described(whole))
    part = pickle.loads(pickle.dumps(read.tokenizer))
    tokens = data.draw(st.lists(st.integers(0, len(part) - 1), max_size=12))
    assert part.convert_ids_to_tokens(tokens) == whole.convert_ids_to_tokens(tokens)
    assert part.decode(tokens) == whole.decode(tokens)
    assert part.eos_token_ids == whole.eos_token_ids
    texts = []
    for tokenizer in (part, whole):
        detokenizer = mlx_tokenizers.detokenizer(tokenizer)
        texts.append("")
        for token in tokens:
            detokenizer.add_token(token)
            texts[-1] += detokenizer.last_segment
        detokenizer.finalize()
        texts[-1] += detokenizer.last_segment
    assert texts[0] == texts[1]


def test_a_process_that_gets_the_part_gets_the_whole_from_another(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", "Hi")
    data, tokenizer = tokenizers.sent(str(folder), {}, None)
    read = tokenizers.received(data)
    assert isinstance(read.tokenizer, tokenizers.AnswerTokenizer)
    assert pickle.loads(read.whole).encode("Hi") == tokenizer.encode("Hi")


def test_a_tokenizer_that_cannot_be_read_says_why(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", "Hi")
    (folder / "tokenizer.json").write_text("{")
    data, tokenizer = tokenizers.sent(str(folder), {}, None)
    assert tokenizer is None
    with pytest.raises(Unreadable, match=r"Failed to parse tokenizer\.json") as raised:
        tokenizers.received(data)
    assert "Failed to parse" in load_failure(raised.value, str(folder)).message
    assert raised.value.kind == "JSONDecodeError"
