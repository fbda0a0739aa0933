"""The server's page in a real Chromium: what it shows, and what its buttons do.

With SCREENSHOTS=folder, pictures of it for the docs are left there.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from tests.support import browser
from tests.support.browser import Visit, browsing, visiting
from tests.support.encoders import make_encoder
from tests.support.loopback_hub import LoopbackHub
from tests.support.models import make_model
from tests.support.server import Server, serving
from tests.support.vision import make_vision_model, png

if TYPE_CHECKING:
    from playwright.sync_api import Browser, FilePayload

pytestmark = pytest.mark.skipif(browser.WHY_NOT is not None, reason=browser.WHY_NOT or "")

KEY = "sesame-open"
QUOTED = 'It\'s "quoted"\n\\ and \u2028 é'
MINE, LONG, SEES = "ann/notes-assistant", "HuggingFaceTB/SmolLM2-135M-Instruct", "ann/sees-pictures"
FINDS = "ann/finds-notes"
SAYS = """<think>A short question. I answer with a list.</think>Three things to try:

1. **Pin** a model, so that it stays in memory.
2. Send it a *picture*, where it sees.
3. Copy the request below into a program:

```python
print("Hello from your own folder")
```
<img src="https://evil.example/x.png" onerror="alert(1)"><script>alert(2)</script>
See [the docs](https://good.example), not [that](javascript:alert(3)).

| size | speed |
|---|---|
| small | quick |"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoopbackHub]:
    made = make_model(tmp_path_factory.mktemp("hub") / "made", "Hello.")
    with LoopbackHub() as hub:
        hub.add_repo("acme/hubs", {path.name: path.read_bytes() for path in made.iterdir()})
        yield hub


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, hub: LoopbackHub) -> Iterator[Server]:
    top = tmp_path_factory.mktemp("page")
    make_model(top / "models" / MINE, SAYS, thinks=True)
    make_model(top / "models" / LONG, "word " * 4000)
    make_vision_model(top / "models" / SEES)
    make_encoder(top / "models" / FINDS)
    options = ["--trust-remote-code", "--alias", f"claude-sonnet-4-5={MINE}", "--memory-budget", "300M"]
    environ = hub.environment(top / "home") | {"HF_HUB_OFFLINE": "0", "MLX_OMNI_API_KEY": KEY}
    with serving(top / "home", top / "models", options=options, environ=environ, api_key=KEY) as server:
        yield server


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with browsing() as started:
        yield started


@pytest.fixture
def shots(tmp_path: Path) -> Path:
    """The folder for pictures of the page."""
    return Path(os.environ.get("SCREENSHOTS") or tmp_path)


@contextmanager
def signed_in(chromium: Browser, server: Server, **options: Any) -> Iterator[Visit]:
    """A page in a tab that has the server's key."""
    with visiting(chromium, server.url, **options) as visit:
        visit.page.add_init_script(f"sessionStorage.setItem('mlx-omni-server-key', '{KEY}')")
        yield visit


def button(visit: Visit, name: str) -> Any:
    return visit.page.get_by_role("button", name=name, exact=True)


def row(visit: Visit, model: str) -> Any:
    return visit.page.get_by_role("row").filter(has_text=model)


def chat_with(model: str) -> str:
    return f"/#chat/{model.replace('/', '%2F')}"


def test_a_model_is_loaded_pinned_and_unloaded_also_by_keyboard(server: Server, chromium: Browser, shots: Path) -> None:
    for model in (MINE, LONG):  # tests come in any order, and leave models in memory
        unload = server.http.post("/manage/v1/models/unload", json={"model": model}, headers={"x-api-key": KEY})
        assert unload.status_code == 200, unload.text
    with signed_in(chromium, server, viewport={"width": 1100, "height": 860}) as visit:
        visit.page.goto(server.url)
        visit.page.get_by_text("None found").wait_for()
        button(visit, f"Load {MINE}").wait_for()
        reached: list[str] = []
        for _ in range(20):
            visit.page.keyboard.press("Tab")
            reached.append(visit.page.evaluate("document.activeElement.ariaLabel ?? document.activeElement.innerText"))
            if reached[-1] == f"Load {MINE}":
                break
        row(visit, FINDS).get_by_text("embedding").wait_for()
        assert not button(visit, f"Chat with {FINDS}").count()
        assert reached[0] == "Skip to the content"
        visit.page.keyboard.press("Enter")
        row(visit, MINE).get_by_text("in memory").wait_for()
        button(visit, f"Pin {MINE}").click()
        row(visit, MINE).get_by_text("pinned").wait_for()
        button(visit, f"Load {LONG}").click()
        row(visit, LONG).get_by_text("in memory").wait_for()
        server.chat(MINE, "Hi")
        visit.page.locator(".figures div").filter(has_text=re.compile(r"first token\s*\d")).wait_for()
        visit.page.mouse.move(0, 0)
        visit.page.screenshot(path=shots / "page-models.png")
        button(visit, f"Unpin {MINE}").click()
        row(visit, MINE).get_by_text("pinned").wait_for(state="detached")
        button(visit, f"Unload {MINE}").click()
        row(visit, MINE).get_by_text("on disk").wait_for()
        visit.page.get_by_role("searchbox", name="Find").fill("SMOL")
        row(visit, MINE).wait_for(state="detached")
        assert row(visit, LONG).count() == 1


def test_a_chat_streams_an_answer_of_which_only_formatting_is_let_through(
    server: Server, chromium: Browser, shots: Path
) -> None:
    with signed_in(chromium, server, viewport={"width": 1000, "height": 960}) as visit:
        visit.page.goto(f"{server.url}{chat_with(MINE)}")
        sent: list[Any] = []
        visit.page.on("request", lambda request: sent.append(request) if "/chat/" in request.url else None)
        visit.page.get_by_text("Parameters").click()
        visit.page.get_by_label("Temperature").fill("0.5")
        visit.page.get_by_label("System prompt").fill("You are brief.")
        visit.page.get_by_text("Parameters").click()
        visit.page.get_by_label("Message").fill("What can I try here?")
        visit.page.keyboard.press("Enter")
        visit.page.get_by_text("tokens in").wait_for()
        body = sent[0].post_data_json
        assert (body["model"], body["temperature"], body["stream"]) == (MINE, 0.5, True)
        assert [each["role"] for each in body["messages"]] == ["system", "user"]
        answer = visit.page.get_by_role("article", name="Answer")
        assert answer.locator("li").count() == 3
        assert answer.locator("pre code").inner_text().startswith("print(")
        assert not answer.locator("img, script").count()
        visit.page.set_viewport_size({"width": 360, "height": 960})
        head = answer.locator("th").first.bounding_box()
        assert head is not None
        assert head["width"] > 20, "the head of a table is seen there, too"
        visit.page.set_viewport_size({"width": 1000, "height": 960})
        assert [each.get_attribute("href") for each in answer.locator("a").all()] == ["https://good.example", None]
        reasoning = answer.get_by_text("A short question.")
        assert not reasoning.is_visible()
        visit.page.evaluate("scrollTo(0, 0)")
        visit.page.screenshot(path=shots / "page-chat.png")
        answer.get_by_text("Reasoning").click()
        reasoning.wait_for()
        visit.page.get_by_text("The same request").click()
        visit.page.get_by_text(f"curl {server.url}/v1/chat/completions").wait_for()
        assert KEY not in visit.page.content()
        visit.page.get_by_label("Most tokens").evaluate("field => field.closest('details').open = true")
        visit.page.get_by_label("Most tokens").fill("9")
        visit.page.get_by_label("Top k").fill("5")
        button(visit, "New conversation").click()
        visit.page.get_by_label("Message").fill(QUOTED)
        visit.page.get_by_role("link", name="Models").click()
        visit.page.get_by_role("link", name="Chat").click()
        assert visit.page.get_by_label("Message").input_value() == QUOTED
        program = visit.page.locator(".snippets code").nth(1).inner_text()
    asked = run_python(program)
    assert [each["content"] for each in asked["messages"]] == ["You are brief.", QUOTED]
    assert (asked["max_tokens"], asked["extra_body"], asked["stream"]) == (9, {"top_k": 5}, True)


def run_python(program: str) -> dict[str, Any]:
    """What a program that the page shows asks OpenAI's client for."""
    asked: list[dict[str, Any]] = []

    def create(**given: Any) -> list[Any]:
        asked.append(given)
        return []

    client = SimpleNamespace(chat=SimpleNamespace(completions=SimpleNamespace(create=create)))
    names: dict[str, Any] = {"OpenAI": lambda **_: client, "os": SimpleNamespace(environ={"MLX_OMNI_API_KEY": KEY})}
    exec(re.sub("^(from|import) .*$", "", program, flags=re.MULTILINE), names)
    (one,) = asked
    return one


def test_a_picture_is_shown_to_a_model_that_sees_and_what_runs_is_stopped(server: Server, chromium: Browser) -> None:
    with signed_in(chromium, server) as visit:
        visit.page.goto(f"{server.url}{chat_with(SEES)}")
        picture: FilePayload = {"name": "red.png", "mimeType": "image/png", "buffer": png("red")}
        visit.page.get_by_label("Add pictures").set_input_files([picture])
        visit.page.get_by_alt_text("Picture 1, to be sent").wait_for()
        visit.page.get_by_label("Message").fill("What is this?")
        most = visit.page.get_by_label("Most tokens")
        most.evaluate("field => field.closest('details').open = true")
        most.fill("20")  # the model would go on to the end of its context
        button(visit, "Send").click()
        visit.page.get_by_alt_text("A picture that you sent").wait_for()
        visit.page.get_by_text("tokens in").wait_for()
        most.fill("")
        assert not visit.page.locator(".warning").count()
        visit.page.get_by_label("Model").select_option(LONG)
        visit.page.get_by_label("Add pictures").wait_for(state="detached")
        for stop in ("here", "in the list", "with its model"):
            button(visit, "New conversation").click()
            visit.page.get_by_label("Message").fill("sesame")
            button(visit, "Send").click()
            visit.page.get_by_text("word word word").wait_for()
            if stop == "here":
                button(visit, "Stop").click()
                visit.page.get_by_text("stopped", exact=True).wait_for()
            elif stop == "in the list":
                visit.page.get_by_role("link", name="Requests").click()
                visit.page.get_by_role("row").filter(has_text="running").get_by_role("button", name="Stop").click()
                visit.page.get_by_text("stopped here").wait_for()
                visit.page.get_by_text("client left").wait_for()
                assert "sesame" not in visit.page.content()
                visit.page.get_by_role("link", name="Chat").click()
                visit.page.get_by_text("This request was stopped").wait_for()
            else:
                visit.page.get_by_role("link", name="Models").click()
                button(visit, f"Unload {LONG}").click()
                button(visit, "Unload anyway").click()
                row(visit, LONG).get_by_text("on disk").wait_for()
                visit.page.get_by_role("link", name="Chat").click()
                visit.page.get_by_text("The model was unloaded").wait_for()


def test_a_key_is_asked_for_once_and_a_server_that_is_gone_is_named(server: Server, chromium: Browser) -> None:
    with visiting(chromium, server.url) as visit:
        visit.page.goto(server.url)
        visit.page.get_by_label("API key").fill("wrong")
        visit.page.keyboard.press("Enter")
        visit.page.get_by_text("did not take this key").wait_for()
        visit.page.get_by_label("API key").fill(KEY)
        visit.page.keyboard.press("Enter")
        row(visit, MINE).wait_for()
        visit.page.reload()
        row(visit, MINE).wait_for()
        visit.page.get_by_role("link", name="API").click()
        visit.page.get_by_text("POST /v1/chat/completions", exact=True).wait_for()
        visit.page.goto(server.url)
        row(visit, MINE).wait_for()
        visit.page.route("**/manage/**", lambda route: route.abort())
        visit.page.get_by_text("no answer from the server").wait_for()
        visit.page.unroute_all()
        visit.page.get_by_text("no answer from the server").wait_for(state="detached")
        visit.errors.clear()  # of the requests that did not come through


def test_without_models_it_says_how_to_get_one_and_downloads_one_on_a_narrow_dark_screen(
    server: Server, chromium: Browser, hub: LoopbackHub
) -> None:
    size = {"width": 320, "height": 640}
    with signed_in(chromium, server, viewport=size, color_scheme="dark", reduced_motion="reduce") as visit:
        visit.page.route("**/manage/v1/models", lambda route: route.fulfill(json={"models": []}))
        visit.page.goto(server.url)
        visit.page.get_by_role("heading", name="No models yet").wait_for()
        background = visit.page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert max(map(int, re.findall(r"\d+", background)[:3])) < 60
        visit.page.unroute_all()
        entry = server.http.get("/manage/v1/models", headers={"x-api-key": KEY}).json()["models"][0]
        many = [{**entry, "id": f'<b>"{number:03}'} for number in range(150)]
        visit.page.route("**/manage/v1/models", lambda route: route.fulfill(json={"models": many}))
        visit.page.reload()
        visit.page.get_by_text("100 of 150 models").wait_for()
        assert row(visit, '<b>"099').count() == 1
        button(visit, "show all").click()
        row(visit, '<b>"149').wait_for()
        visit.page.unroute_all()
        hub.slow(30_000)
        for model in ("acme/none", "acme/hubs"):
            visit.page.get_by_label("Id on the Hub").fill(model)
            button(visit, "Download").click()
            visit.page.get_by_text(f"no model {model}").or_(button(visit, f"Cancel {model}")).first.wait_for()
        visit.page.get_by_text(re.compile(r"KB of \d+ KB")).wait_for()
        button(visit, "Cancel acme/hubs").click()
        hub.heal()
        button(visit, "Resume acme/hubs").click()
        row(visit, "acme/hubs").get_by_text("Hugging Face cache").wait_for()
        for view in ("models", "chat", "requests"):
            visit.page.goto(f"{server.url}/#{view}")
            assert visit.page.evaluate("document.documentElement.scrollWidth") <= 320, f"{view} is too wide"
