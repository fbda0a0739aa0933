"""Models for every program: what each asks huggingface_hub for is answered from the user's folder alone (P1, P2).

Where a package is not installed here, what it asks is written down from its source, named beside it.
"""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.support.folders import lay_files, weights
from tests.support.hfcache import add_repo, listing
from tests.support.online import Client, Person, at_a_shell, contents
from tests.support.processes import OVERLAY, succeed

Files = Mapping[str, bytes]


def config(**values: object) -> bytes:
    return json.dumps(values).encode()


def shards(stem: str) -> Files:
    names = [f"{stem}-0000{number}-of-00002.safetensors" for number in (1, 2)]
    index = config(weight_map={str(number): name for number, name in enumerate(names)})
    return {f"{stem}.safetensors.index.json": index, **{name: weights(name.encode()) for name in names}}


SENTENCE, PIPELINE, BERT, VISION, BOTH, MISTRAL = MODELS = (
    "org/sentence",
    "org/pipeline",
    "org/bert",
    "org/vision",
    "org/both-formats",
    "org/mistral",
)
LAID: Mapping[str, Files] = {
    SENTENCE: {
        "modules.json": b"[]",
        "config_sentence_transformers.json": b"{}",
        "config.json": config(model_type="bert"),
        "model.safetensors": weights(b"sentence"),
        "1_Pooling/config.json": config(pooling="mean"),
        "tokenizer.json": b"{}",
    },
    PIPELINE: {
        "model_index.json": config(_class_name="StableDiffusionPipeline"),
        "scheduler/scheduler_config.json": b"{}",
        "unet/config.json": b"{}",
        "unet/diffusion_pytorch_model.safetensors": weights(b"unet"),
        "unet/diffusion_pytorch_model.bin": b"not asked for",
        "vae/config.json": b"{}",
        "vae/diffusion_pytorch_model.safetensors": weights(b"vae"),
    },
    BERT: {"config.json": config(model_type="bert", vocab_size=7), "pytorch_model.bin": b"bin", "vocab.txt": b"[UNK]"},
    VISION: {
        "config.json": config(model_type="qwen2_vl"),
        "preprocessor_config.json": b"{}",
        "chat_template.jinja": b"{{ messages }}",
        "tokenizer.json": b"{}",
        "original.pth": b"not asked for",
        **shards("model"),
    },
    BOTH: {"config.json": config(model_type="mistral"), "consolidated.safetensors": weights(b"all"), **shards("model")},
    MISTRAL: {"params.json": b"{}", "tekken.json": b"{}", **shards("consolidated")},
}
KINDS = dict(zip(MODELS, ("sentence-transformers", "diffusers", *["transformers"] * 3, "other"), strict=True))
DATA = "org/data"
IN_DATA = {"README.md": b"---\nlicense: mit\n---\n", "data/train-00000-of-00001.parquet": b"rows", "other.csv": b"a,b"}


@pytest.fixture(scope="module")
def person(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Person]:
    """The Hub has other files under all ids, of which none is ever asked for."""
    top = tmp_path_factory.mktemp("kinds")
    with at_a_shell(top) as person:
        for model_id, files in LAID.items():
            lay_files(person.models / model_id, files)
            person.hub.add_repo(model_id, dict.fromkeys((*files, "more.safetensors"), b"the Hub's"))
        tier = top / "shared" / "hub"
        commit = person.hub.add_repo(DATA, IN_DATA, repo_type="dataset")
        add_repo(tier, DATA, IN_DATA, repo_type="dataset", commit=commit)
        before = listing(top / "drive"), listing(tier)
        yield person
        assert (listing(top / "drive"), listing(tier)) == before, "P1: the user's folder, or the tier, was changed"
        assert [person.asked_about(each) for each in MODELS] == [[]] * len(MODELS), "P2: the Hub was asked"
        assert person.hub.bytes_served(DATA) == 0


@pytest.fixture(scope="module")
def client(person: Person) -> Iterator[Client]:
    tier = person.home.parent / "shared" / "hub"
    with person.client(options=("--kind", "any", "--below", str(tier))) as client:
        yield client


def chosen(model_id: str, *patterns: str) -> Files:
    """The files of a model that any of the patterns match, as huggingface_hub does: `*` goes over folders."""
    return {
        name: content
        for name, content in LAID[model_id].items()
        if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
    }


def test_all_of_them_are_listed_with_their_kind(person: Person) -> None:
    command = [OVERLAY, "ls", "--json", "--kind", "any", "--model-path", str(person.models)]
    done = succeed(command, {**person.environ, "HF_HUB_OFFLINE": "1"})
    found = {each["id"]: each["kind"] for each in json.loads(done.out)}
    # What mlx-lm can load, too, is named after it where it is installed.
    assert {**found, VISION: "transformers"} == KINDS


def test_transformers(client: Client) -> None:
    """The installed one."""
    assert client.get("transformers.AutoConfig.from_pretrained", BERT)["vocab_size"] == 7
    for name, content in LAID[BERT].items():
        assert Path(client.get("transformers.utils.cached_file", BERT, name)).read_bytes() == content
    absent = {"_raise_exceptions_for_missing_entries": False}
    assert client.get("transformers.utils.cached_file", BERT, "model.safetensors", **absent) is None


def test_sentence_transformers(client: Client) -> None:
    """load_file_path and load_dir_path of 6.2 (util/file_io.py)."""
    library = {"library_name": "sentence-transformers"}
    for name in ("modules.json", "config_sentence_transformers.json"):
        path = client.get("hf_hub_download", SENTENCE, name, subfolder=".", **library)
        assert Path(path).read_bytes() == LAID[SENTENCE][name]
    failure = client.failure("hf_hub_download", SENTENCE, "sentence_bert_config.json", subfolder=".", **library)
    assert failure.error == "RemoteEntryNotFoundError", "an optional file is absent, and no error"
    pooling = client.get("snapshot_download", SENTENCE, allow_patterns="1_Pooling/**", **library)
    assert (Path(pooling) / "1_Pooling/config.json").read_bytes() == LAID[SENTENCE]["1_Pooling/config.json"]


def test_diffusers(client: Client) -> None:
    """DiffusionPipeline.download of 0.42 (pipelines/pipeline_utils.py), and what it does without a network."""
    names = {each["rfilename"] for each in client.get("model_info", PIPELINE)["siblings"]}
    assert names == set(LAID[PIPELINE])
    index = client.get("hf_hub_download", PIPELINE, "model_index.json")
    assert Path(index).read_bytes() == LAID[PIPELINE]["model_index.json"]
    allowed = ["unet/*.safetensors", "vae/*.safetensors", "scheduler/*", "*/config.json", "model_index.json"]
    folder = client.get("snapshot_download", PIPELINE, allow_patterns=allowed, ignore_patterns=["*.bin"])
    wanted = chosen(PIPELINE, *allowed)
    assert {name: content for name, content in contents(folder).items() if name in wanted} == wanted
    known = client.get("huggingface_hub.get_cached_repo_tree", PIPELINE)
    assert {each["path"] for each in known} == names


def test_mlx_vlm(client: Client) -> None:
    """get_model_path of 0.7 (utils.py)."""
    patterns = ["*.json", "*.jsonl", "*.safetensors", "*.py", "*.model", "*.tiktoken", "*.txt", "*.jinja"]
    folder = client.get("snapshot_download", VISION, revision=None, allow_patterns=patterns, force_download=False)
    wanted = chosen(VISION, *patterns)
    assert {name: content for name, content in contents(folder).items() if name in wanted} == wanted


@pytest.mark.parametrize(
    ("model_id", "loaded", "index"),
    [
        (BOTH, "consolidated*.safetensors", "consolidated.safetensors.index.json"),
        (MISTRAL, "consolidated*.safetensors", "consolidated.safetensors.index.json"),
        (VISION, "*.safetensors", "model.safetensors.index.json"),
        (BERT, "*.bin", "model.safetensors.index.json"),
    ],
)
def test_vllm(client: Client, model_id: str, loaded: str, index: str) -> None:
    """DefaultModelLoader of 2026 (model_executor/model_loader/default_loader.py, weight_utils.py), replayed."""
    names = [name.rpartition("/")[2] for name in client.get("list_repo_files", model_id)]
    is_mistral = bool(fnmatch.filter(names, "consolidated*.safetensors"))
    patterns = ["consolidated*.safetensors"] if is_mistral else ["*.safetensors", "*.bin", "*.pt"]
    listed = client.get("huggingface_hub.hffs.ls", model_id, detail=False, revision=None)
    patterns = [each for each in patterns if fnmatch.filter(listed, each)][:1] or patterns
    assert patterns == [loaded]
    folder = Path(client.get("snapshot_download", model_id, allow_patterns=patterns, ignore_patterns="original/**/*"))
    assert {path.name: path.read_bytes() for path in folder.glob(loaded)} == chosen(model_id, loaded)
    if index in LAID[model_id]:
        assert Path(client.get("hf_hub_download", model_id, index)).read_bytes() == LAID[model_id][index]
    else:
        assert client.failure("hf_hub_download", model_id, index).error == "RemoteEntryNotFoundError"
    settings = client.get("snapshot_download", model_id, allow_patterns="*.json")
    assert chosen(model_id, "*.json").items() <= contents(settings).items()
    offline = {"allow_patterns": ["*.safetensors", "*.bin", "*.pt"], "local_files_only": True}
    assert Path(client.get("snapshot_download", model_id, **offline)) == folder


def test_a_dataset_in_a_tier(person: Person, client: Client) -> None:
    """load_dataset of datasets 5.2 (load.py, data_files.py, utils/file_utils.py), and snapshot_download."""
    commit = client.get("dataset_info", DATA)["sha"]
    how = {"repo_type": "dataset", "revision": commit}
    assert Path(client.get("hf_hub_download", DATA, "README.md", **how)).read_bytes() == IN_DATA["README.md"]
    assert client.failure("hf_hub_download", DATA, ".huggingface.yaml", **how).error == "RemoteEntryNotFoundError"
    [found] = client.get("huggingface_hub.hffs.glob", f"datasets/{DATA}@{commit}/data/*.parquet")
    name = found.partition(f"{commit}/")[2]
    assert Path(client.get("hf_hub_download", DATA, name, **how)).read_bytes() == IN_DATA[name]
    assert contents(client.get("snapshot_download", DATA, repo_type="dataset")) == IN_DATA
    assert contents(client.get("snapshot_download", DATA, repo_type="dataset", local_files_only=True)) == IN_DATA
    assert not list(person.cache.glob("datasets--*/blobs/*")), "what the tier holds is not copied"
