"""Which GGUF file a tag names: the one that llama.cpp itself would choose."""

from __future__ import annotations

import pytest
from hf_overlay.gateway import manifests
from hf_overlay.models import File

from tests.support import llama_cpp

NAMES = (
    "BF16/m-BF16-00001-of-00002.gguf",
    "BF16/m-BF16-00002-of-00002.gguf",
    "README.md",
    "imatrix.gguf",
    "m-IQ4_XS.gguf",
    "m-Q4_0.gguf",
    "m-Q4_K_M.gguf",
    "m-Q4_K_S.gguf",
    "m-UD-Q4_K_XL.gguf",
    "m.Q8_0.gguf",
    "mmproj-BF16.gguf",
)


def chosen(tag: str, names: tuple[str, ...] = NAMES) -> tuple[str | None, ...] | None:
    found = manifests.chosen([File(name, 1, 0) for name in names], tag)
    return None if found is None else tuple(file and file.name for file in found)


@pytest.mark.parametrize(
    ("tag", "name"),
    {
        "latest": "m-Q4_K_M.gguf",
        "Q4_K_S": "m-Q4_K_S.gguf",
        "q8_0": "m.Q8_0.gguf",
        "bf16": "BF16/m-BF16-00001-of-00002.gguf",
        "UD-Q4_K_XL": "m-UD-Q4_K_XL.gguf",
    }.items(),
)
def test_a_tag_names_a_file_and_the_projector_beside_it(tag: str, name: str) -> None:
    assert chosen(tag) == (name, "mmproj-BF16.gguf")
    assert llama_cpp.best(NAMES, "" if tag == "latest" else tag) == name


@pytest.mark.parametrize("tag", ["Q5_K_M", "Q4", "Q4_K", ".*", "(", "imatrix", "mmproj"])
def test_a_tag_that_no_file_has_names_none(tag: str) -> None:
    assert chosen(tag) is None


def test_without_a_tag_four_bits_come_first_then_whatever_there_is() -> None:
    assert chosen("latest", ("m-IQ2_M.gguf", "m-Q8_0.gguf", "m-Q4_1.gguf")) == ("m-Q4_1.gguf", None)
    assert chosen("latest", ("m-IQ2_M.gguf", "m-Q8_0.gguf")) == ("m-Q8_0.gguf", None)
    assert chosen("latest", ("m.gguf",)) == ("m.gguf", None)
    assert chosen("latest", ("mmproj.gguf", "config.json")) is None
