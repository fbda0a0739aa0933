"""The way to the real Hub: which proxy leads there, and what happens where none can."""

from __future__ import annotations

import os

import pytest
from hf_overlay.gateway import upstream
from hf_overlay.gateway.exchange import Request
from hf_overlay.gateway.upstream import Unreachable, Upstream


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("url", "environ", "proxy"),
    [
        ("https://huggingface.co", {}, None),
        ("https://huggingface.co", {"HTTPS_PROXY": "http://p:1", "HTTP_PROXY": "http://q:1"}, "http://p:1"),
        ("https://huggingface.co", {"https_proxy": "p:1"}, "http://p:1"),
        ("https://huggingface.co", {"ALL_PROXY": "http://p:1", "NO_PROXY": "example.com,.other.org"}, "http://p:1"),
        ("https://huggingface.co", {"ALL_PROXY": "http://p:1", "NO_PROXY": "co"}, None),
        ("https://huggingface.co", {"ALL_PROXY": "http://p:1", "NO_PROXY": "*"}, None),
        ("http://10.1.2.3:8080", {"HTTP_PROXY": "http://p:1", "NO_PROXY": "localhost, 10.0.0.0/8"}, None),
        ("http://11.1.2.3:8080", {"HTTP_PROXY": "http://p:1", "NO_PROXY": "localhost, 10.0.0.0/8"}, "http://p:1"),
        ("http://[fd00::1]/x", {"HTTP_PROXY": "http://p:1", "NO_PROXY": "fd00::/8"}, None),
    ],
)
def test_the_proxy_is_the_one_that_the_environment_names(
    url: str, environ: dict[str, str], proxy: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert upstream._proxy(url) == proxy


def test_a_proxy_s_name_and_password_are_for_it_alone() -> None:
    assert upstream._proxy_login("http://me:p%40ss@proxy:1") == {"proxy-authorization": "Basic bWU6cEBzcw=="}
    assert upstream._proxy_login("http://proxy:1") is None


def test_a_proxy_of_an_unknown_kind_is_named_without_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", "socks5://me:secret@proxy:1")
    with pytest.raises(Unreachable, match=r"the proxy that the environment names is socks5://…$"):
        Upstream("https://huggingface.co", "http://127.0.0.1:1/secret")


def test_a_mirror_s_name_and_password_are_said_to_it_and_to_nobody_else() -> None:
    hub = Upstream("http://me:p%40ss@127.0.0.1:9/hf", "http://127.0.0.1:1/secret")
    assert upstream._without_login("https://me:p%40ss@mirror/hf") == ("https://mirror/hf", "Basic bWU6cEBzcw==")
    assert upstream._without_login("https://mirror/a@b") == ("https://mirror/a@b", None)
    with pytest.raises(Unreachable, match=r"^http://127\.0\.0\.1:9/hf cannot be reached"):
        hub.send(Request("GET", "/x", [], iter(())), "/x")


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "nonsense", "http://[", "ftp://127.0.0.1"])
def test_a_hub_that_is_not_there_is_unreachable(url: str) -> None:
    with pytest.raises(Unreachable, match="cannot be reached"):
        Upstream(url, "http://127.0.0.1:1/secret").send(Request("GET", "/x", [], iter(())), "/x")
