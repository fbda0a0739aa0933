"""Profiles: what a request gets where it says nothing itself."""

from __future__ import annotations

from mlx_overlay_server.chat.requests import ChatRequest, Message, Params, TextRequest
from mlx_overlay_server.live import Live, Target
from mlx_overlay_server.profiles import applied
from mlx_overlay_server.settings import Profile, Settings

PROFILE = Profile(
    model="org/m",
    context=100,
    max_tokens=10,
    temperature=0.5,
    top_p=0.8,
    top_k=3,
    min_p=0.1,
    repetition_penalty=1.2,
    system="Be brief.",
    chat_template="{{ x }}",
    chat_template_kwargs={"a": 1, "b": 2},
    reasoning_budget=7,
)
USER = Message("user", ("hi",))


def test_a_request_that_says_nothing_gets_all_of_it() -> None:
    request = applied(PROFILE, ChatRequest("code", messages=(USER,)))
    assert request.model == "code", "the client is answered in the name that it used"
    assert request.params == Params(
        temperature=0.5, top_p=0.8, top_k=3, min_p=0.1, repetition_penalty=1.2, max_tokens=10
    )
    assert request.messages == (Message("system", ("Be brief.",)), USER)
    assert (request.context, request.chat_template, request.reasoning_budget) == (100, "{{ x }}", 7)
    assert request.template_kwargs == {"a": 1, "b": 2}


def test_what_a_request_says_wins() -> None:
    own = Message("system", ("Be long.",))
    params = Params(temperature=0, top_k=0, max_tokens=1, top_p=0.1, min_p=0, repetition_penalty=1)
    request = applied(
        PROFILE,
        ChatRequest("code", params, messages=(own, USER), template_kwargs={"b": 3}, reasoning_budget=0),
    )
    assert request.params == params
    assert request.messages == (own, USER)
    assert request.template_kwargs == {"a": 1, "b": 3}
    assert request.reasoning_budget == 0
    assert request.context == 100, "a limit that no request lifts"


def test_plain_prompts_get_the_sampling_and_the_context() -> None:
    request = applied(PROFILE, TextRequest("code", prompts=("x",)))
    assert (request.prompts, request.params.temperature, request.context) == (("x",), 0.5, 100)


def test_names_lead_through_aliases_and_profiles_to_models() -> None:
    tuned = Profile(model="org/m", adapter_path="/lora")
    own = Profile(model="org/own", adapter_path="/lora")
    small = Profile(model="org/m", kv_bits=4)
    profiles = {"code": PROFILE, "tuned": tuned, "org/own": own, "small": small}
    live = Live(Settings(aliases={"gpt-5": "code", "plain": "org/x"}, profiles=profiles))
    assert live.target("org/x") == Target("org/x")
    assert live.target("plain") == Target("org/x")
    assert live.target("gpt-5") == live.target("code") == Target("org/m", PROFILE)
    assert live.target("tuned") == Target("tuned", tuned), "with other weights, it is a model of its own in memory"
    assert live.target("small").id == "small", "what it keeps of prompts is nothing for the others"
    assert live.target("org/own") == Target("org/own", own)
    assert [live.source(name) for name in ("tuned", "org/own", "org/x")] == ["org/m", "org/own", "org/x"]
