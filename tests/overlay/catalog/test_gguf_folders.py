"""Folders of GGUF files, as LM Studio and the Hub's repos have them, where every kind of model is shown (P7, P12)."""

from __future__ import annotations

from pathlib import Path

import pytest
from hf_overlay.catalog import kinds
from hf_overlay.catalog.kinds import ModelTypes
from hf_overlay.catalog.scan import Scanner
from hf_overlay.models import Code, Source

from tests.support import hfcache
from tests.support.folders import gguf, lay_files, lay_model, weights

WHOLE = gguf(b"weights")


def scan(root: Path, types: ModelTypes | None = None) -> Source:
    return Scanner((str(root),), str(root / "no-cache"), types).scan()[0]


def found(source: Source) -> dict[str, list[str]]:
    return {model.id: [file.name for file in model.files] for model in source.models}


def reasons(source: Source) -> dict[str | None, tuple[Code, str]]:
    return {each.id: (each.reason.code, each.reason.text) for each in source.rejects}


@pytest.mark.parametrize(
    "names",
    [
        ["model-Q4_K_M.gguf"],
        ["README.md", "mmproj-model-f16.gguf", "model-IQ3_M.gguf", "model-Q4_K_M.gguf"],
        ["model-Q8_0-00001-of-00002.gguf", "model-Q8_0-00002-of-00002.gguf"],
        ["BF16/model-BF16-00001-of-00002.gguf", "BF16/model-BF16-00002-of-00002.gguf", "model-Q4_0.gguf"],
        ["Q8_0/model-Q8_0-00001-of-00001.gguf", "README.md", "UD-Q4_K_XL/model-UD-Q4_K_XL.gguf"],
        ["model-Q4_K_S/model-Q4_K_S-00001-of-00001.gguf", "model-iq2_xxs/model-iq2_xxs.gguf"],
    ],
    ids=["one", "several and a projector", "split", "split in a folder", "folders", "folders with the model's name"],
)
def test_a_gguf_folder_is_one_model_of_kind_gguf(models: Path, names: list[str]) -> None:
    lay_files(models / "publisher/model-GGUF", dict.fromkeys(names, WHOLE))
    source = scan(models)
    assert found(source) == {"publisher/model-GGUF": names}
    assert reasons(source) == {}
    assert kinds.kind_of(source.models[0], kinds.installed()) == "gguf"


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"model-00001-of-00002.gguf": WHOLE}, "1 of 2 shards not there"),
        ({"Q8_0/model-00002-of-00002.gguf": WHOLE}, "1 of 2 shards not there"),
        ({"model.gguf": WHOLE[:-1]}, "still being copied?"),
        ({"model.gguf": WHOLE, "BF16/model.gguf": WHOLE[:-1]}, "BF16/model.gguf holds"),
        ({"model.gguf": b""}, "is empty"),
        ({"model.gguf": b"<html>not found</html>"}, "is not a GGUF file"),
    ],
    ids=["shard", "shard in a folder", "cut", "cut in a folder", "empty", "something else"],
)
def test_half_a_gguf_folder_is_no_model(models: Path, files: dict[str, bytes], reason: str) -> None:
    lay_files(models / "publisher/model-GGUF", files)
    source = scan(models)
    assert found(source) == {}
    code, text = reasons(source)["publisher/model-GGUF"]
    assert code is Code.INCOMPLETE
    assert reason in text


def test_folders_that_hold_models_stay_folders_whatever_they_are_called(models: Path) -> None:
    """Only a folder named after a quantisation of the model around it is a part of that model."""
    for name in ("llms/one-Q4_0/one.gguf", "llms/two-Q4_0/two.gguf", "Q8_0/publisher/model/model.gguf"):
        lay_files(models, {name: WHOLE})
    assert list(found(scan(models))) == ["Q8_0/publisher/model", "llms/one-Q4_0", "llms/two-Q4_0"]


def test_beside_other_weights_a_gguf_file_changes_nothing(models: Path) -> None:
    lay_model(models / "org/both", {"both-Q4_0.gguf": WHOLE, "gguf/both-Q8_0.gguf": WHOLE[:-1]})
    types = kinds.installed()
    for restriction, kind in ((None, "transformers"), (types, "mlx")):
        if restriction is None or types is not None:
            [model] = scan(models, restriction).models
            assert kinds.kind_of(model, restriction) == kind


def test_a_cached_gguf_repo_is_a_model_too(hub: Path) -> None:
    hfcache.add_repo(hub, "publisher/model-GGUF", {"model-Q4_0.gguf": WHOLE})
    [model] = Scanner((), str(hub), None).scan_cache().models
    assert (model.id, [file.name for file in model.files]) == ("publisher/model-GGUF", ["model-Q4_0.gguf"])


def test_a_model_in_mistrals_own_format_is_a_model(models: Path) -> None:
    """params.json and consolidated.safetensors, which vLLM loads; a params.json alone may be anything's."""
    lay_files(models / "org/pixtral", {"params.json": b"{}", "consolidated.safetensors": weights(b"w")})
    lay_files(models / "runs/one", {"params.json": b"{}"})
    assert found(scan(models)) == {"org/pixtral": ["consolidated.safetensors", "params.json"]}
