"""The files of the server's own pages, and how they are handed out."""

from __future__ import annotations

import asyncio
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from mlx_overlay_server.api import page
from mlx_overlay_server.api.refusals import add_error_handlers
from starlette.types import Message

FOLDER = Path(str(files("mlx_overlay_server") / page.FOLDER))
OWN = sorted(path for path in FOLDER.glob("*.*") if path.is_file())
MAX_BYTES = 400_000


def ask(path: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of an answer."""
    app = FastAPI(docs_url=None, redoc_url=None)
    app.include_router(page.router())
    add_error_handlers(app)
    scope: dict[str, Any] = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()],
    }
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Message) -> None:
        sent.append(message)

    asyncio.run(app(scope, receive, send))
    found = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], found, b"".join(message.get("body", b"") for message in sent[1:])


def test_a_browser_gets_the_page_and_a_program_the_server_s_name() -> None:
    status, headers, body = ask("/", accept="text/html,application/xhtml+xml,*/*;q=0.8")
    assert (status, headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert b"<main" in body
    for accept in ("*/*", "application/json"):
        status, headers, body = ask("/", accept=accept)
        assert (status, headers["content-type"], headers["vary"]) == (200, "application/json", "Accept")
        assert b"mlx-omni-server" in body
    assert ask("/", method="HEAD")[0] == 200


@pytest.mark.parametrize("path", ["/docs", *(f"/ui/{each.name}" for each in OWN)])
def test_each_file_says_that_it_loads_nothing_from_elsewhere_and_is_sent_once(path: str) -> None:
    status, headers, body = ask(path)
    assert (status, headers["x-content-type-options"]) == (200, "nosniff")
    policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'self'"
    assert policy["frame-ancestors"] == "'none'"
    assert not {"script-src", "connect-src", "style-src"} & policy.keys()
    assert int(headers["content-length"]) == len(body)
    status, again, body = ask(path, if_none_match=headers["etag"])
    assert (status, body, again["etag"]) == (304, b"", headers["etag"])


@pytest.mark.parametrize(
    "name",
    [
        "nothing.js",
        "",
        "vendor",
        "vendor/",
        "vendor/README.md",
        "vendor/marked/LICENSE",
        "../app.py",
        "..%2fapp.py",
        "vendor/../app.js",
        "./app.js",
        "/app.js",
        "app.js/",
        "app.js/x.js",
        "\x00.js",
    ],
)
def test_no_other_name_leads_to_a_file(name: str) -> None:
    assert ask(f"/ui/{name}")[0] == 404


@pytest.mark.parametrize("path", OWN, ids=lambda path: path.name)
def test_nothing_of_ours_names_another_host_or_puts_text_into_the_page_as_html(path: Path) -> None:
    text = path.read_text("utf-8").replace("http://www.w3.org/2000/svg", "")
    assert not re.findall(r"https?://\w", text)
    assert not re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|unsafeHTML|\beval\(", text)
    assert not re.findall(r"\sstyle=|\son\w+=\"", text), "the policy forbids styles and scripts in elements"


def test_the_page_is_small_and_its_libraries_have_their_licenses() -> None:
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) < MAX_BYTES
    named = (FOLDER / "vendor/README.md").read_text("utf-8")
    for library in (path for path in (FOLDER / "vendor").iterdir() if path.is_dir()):
        assert (library / "LICENSE").is_file()
        assert library.name in named
