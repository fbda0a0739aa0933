"""The bodies that OpenAI's clients send for chat completions and completions, and how they are decoded."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import Field

from mlx_overlay_server.api.fields import (
    MAX_STOPS,
    Body,
    Count,
    Json,
    ModelBody,
    Number,
    Part,
    Penalty,
    Seed,
    Share,
    Temperature,
    Token,
    Whole,
)
from mlx_overlay_server.api.openai.messages import ChatMessage, decoded_message
from mlx_overlay_server.chat import requests
from mlx_overlay_server.chat.requests import ChatRequest, Params, TextRequest
from mlx_overlay_server.errors import InvalidRequest

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class StreamOptions(Body):
    """Options for what a stream holds beside the answer."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None
    """Padding against those who measure what passes on a network; asks for nothing here."""


class _SamplingBody(ModelBody):
    """The fields that chat completions and completions have in common."""

    max_tokens: Count | None = None
    prompt_logprobs: Annotated[Whole, Field(ge=0, le=20)] | None = None
    min_tokens: Annotated[Whole, Field(ge=0, le=1 << 31)] | None = None
    temperature: Temperature | None = None
    top_p: Share | None = None
    top_k: Annotated[Whole, Field(ge=-1)] | None = None
    min_p: Share | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[Number, Field(ge=0.01, le=10)] | None = None
    repeat_penalty: Annotated[Number, Field(ge=0.01, le=10)] | None = None
    """`repetition_penalty`, as llama.cpp, Ollama and LM Studio call it."""
    repetition_context_size: Count | None = None
    logit_bias: dict[int, Annotated[Number, Field(ge=-100, le=100)]] | None = None
    seed: Seed | None = None
    n: Annotated[Whole, Field(ge=1, le=128)] | None = None
    stop: str | Annotated[list[str], Field(max_length=MAX_STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # What asks for nothing here: names for billing and caches of their own.
    user: str | None = None
    metadata: dict[str, Any] | None = None

    def _params(self, logprobs: int | None, max_tokens: int | None) -> Params:
        if self.min_tokens and max_tokens is not None and self.min_tokens > max_tokens:
            raise InvalidRequest(f"`min_tokens` is more than the answer may have: {max_tokens}", param="min_tokens")
        return Params(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=None if self.top_k is None else max(self.top_k, 0),
            min_p=self.min_p,
            repetition_penalty=self.repeat_penalty if self.repetition_penalty is None else self.repetition_penalty,
            repetition_context=self.repetition_context_size,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            logit_bias=self.logit_bias or {},
            seed=self.seed,
            max_tokens=max_tokens,
            min_tokens=self.min_tokens or 0,
            logprobs=logprobs,
            prompt_logprobs=self.prompt_logprobs,
        )

    def _stops(self) -> tuple[str, ...]:
        stops = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        if "" in stops:
            raise InvalidRequest("a stop sequence is empty", param="stop")
        return stops

    def _check_stream(self) -> None:
        if self.prompt_logprobs is not None and self.stream:
            raise InvalidRequest("`prompt_logprobs` are not streamed", param="prompt_logprobs")
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("`stream_options` needs `stream`", param="stream_options")

    @property
    def includes_usage(self) -> bool:
        """Whether the stream ends with a chunk of token counts."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class FunctionSpec(Part):
    """A function; `parameters` is a JSON schema."""

    name: Annotated[str, Field(min_length=1, max_length=256)]
    description: str | None = None
    parameters: Json | None = None
    strict: bool | None = None


class FunctionTool(Part):
    """A tool that the client runs."""

    type: Literal["function"]
    function: FunctionSpec


class FunctionName(Body):
    """The name of a function."""

    name: str


class NamedToolChoice(Body):
    """The one function that the answer must call."""

    type: Literal["function"]
    function: FunctionName


class TextFormat(Body):
    """Any text."""

    type: Literal["text"]


class ObjectFormat(Body):
    """Any JSON object."""

    type: Literal["json_object"]


class NamedSchema(Part):
    """A JSON schema with a name."""

    name: str
    description: str | None = None
    schema_: Annotated[Json, Field(alias="schema")]
    strict: bool | None = None


class SchemaFormat(Body):
    """JSON that a schema describes."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


class ThinkingSwitch(Part):
    """Whether to reason first, as GLM's, Kimi's and DeepSeek's servers have it."""

    type: Literal["enabled", "disabled"]


class ReasoningChoice(Body):
    """The reasoning before the answer, as OpenRouter has it."""

    enabled: bool | None = None
    effort: Effort | None = None
    max_tokens: Count | None = None


class ChatCompletionRequest(_SamplingBody):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Count | None = None
    tools: list[FunctionTool] | None = None
    tool_choice: Literal["auto", "none", "required"] | NamedToolChoice | None = None
    parallel_tool_calls: bool | None = None
    functions: list[FunctionSpec] | None = None
    function_call: Literal["auto", "none"] | FunctionName | None = None
    response_format: Annotated[TextFormat | ObjectFormat | SchemaFormat, Field(discriminator="type")] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[Whole, Field(ge=0, le=20)] | None = None
    reasoning_effort: Effort | None = None
    reasoning: ReasoningChoice | None = None
    thinking: ThinkingSwitch | None = None
    enable_thinking: bool | None = None
    chat_template_kwargs: Json | None = None
    verbosity: requests.Verbosity | None = None
    store: bool | None = None
    # What asks for nothing here.
    service_tier: Literal["auto", "default"] | None = None
    modalities: list[Literal["text"]] | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: Json | None = None
    safety_identifier: str | None = None

    def decoded(self) -> ChatRequest:
        """Return the request that all dialects share. Raises InvalidRequest."""
        self._check_stream()
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequest("`top_logprobs` needs `logprobs`", param="top_logprobs")
        specs = [each.function for each in self.tools or ()] + (self.functions or [])
        tools = tuple(requests.Tool(each.name, each.description, each.parameters) for each in specs)
        reasoning = self.reasoning or ReasoningChoice()
        return ChatRequest(
            model=self.model,
            params=self._params(
                (self.top_logprobs or 0) if self.logprobs else None, self.max_completion_tokens or self.max_tokens
            ),
            stop=self._stops(),
            n=self.n or 1,
            messages=tuple(decoded_message(each, f"messages[{at}]") for at, each in enumerate(self.messages)),
            tools=tools,
            choice=self._choice(tools),
            format=self._format(),
            effort=self.reasoning_effort or reasoning.effort,
            thinking=self._thinking(reasoning),
            reasoning_budget=reasoning.max_tokens,
            template_kwargs=self.chat_template_kwargs or {},
            verbosity=self.verbosity,
        )

    def _thinking(self, reasoning: ReasoningChoice) -> bool | None:
        """Return whether to reason first, which four fields can say. Raises InvalidRequest where they disagree."""
        named = {
            "enable_thinking": self.enable_thinking,
            "thinking": None if self.thinking is None else self.thinking.type == "enabled",
            "reasoning": reasoning.enabled,
        }
        given = {name: is_on for name, is_on in named.items() if is_on is not None}
        if len(set(given.values())) > 1:
            raise InvalidRequest(f"{' and '.join(f'`{name}`' for name in given)} disagree", param=next(iter(given)))
        return next(iter(given.values()), None)

    @property
    def has_functions(self) -> bool:
        """Whether the answer calls in the older form, which `tools` replaced."""
        return self.functions is not None

    def _choice(self, tools: tuple[requests.Tool, ...]) -> requests.ToolChoice:
        if self.functions is not None or self.function_call is not None:
            return self._function_choice(tools)
        is_parallel = self.parallel_tool_calls is not False
        if self.tool_choice is None or self.tool_choice == "auto":
            return requests.ToolChoice(parallel=is_parallel)
        if self.tool_choice == "none":
            return requests.ToolChoice("none")
        if not tools:
            raise InvalidRequest("`tool_choice` needs `tools`", param="tool_choice")
        if self.tool_choice == "required":
            return requests.ToolChoice("required", parallel=is_parallel)
        name = self.tool_choice.function.name
        if name not in {tool.name for tool in tools}:
            raise InvalidRequest(f"`tools` has no function {name}", param="tool_choice")
        return requests.ToolChoice("required", name, is_parallel)

    def _function_choice(self, tools: tuple[requests.Tool, ...]) -> requests.ToolChoice:
        """Return the choice that `function_call` makes: an answer calls one function at most."""
        newer = {"tools": self.tools, "tool_choice": self.tool_choice, "parallel_tool_calls": self.parallel_tool_calls}
        if given := [name for name, value in newer.items() if value is not None]:
            raise InvalidRequest(f"`functions` and `{given[0]}` exclude each other", param="functions")
        if self.function_call is None or self.function_call == "auto":
            return requests.ToolChoice(parallel=False)
        if self.function_call == "none":
            return requests.ToolChoice("none")
        name = self.function_call.name
        if name not in {tool.name for tool in tools}:
            raise InvalidRequest(f"`functions` has no function {name}", param="function_call")
        return requests.ToolChoice("required", name, parallel=False)

    def _format(self) -> requests.Format | None:
        if isinstance(self.response_format, ObjectFormat):
            return requests.Format(None)
        if isinstance(self.response_format, SchemaFormat):
            return requests.Format(self.response_format.json_schema.schema_)
        return None


Prompt = str | Annotated[list[str], Field(min_length=1)] | Annotated[list[Token], Field(min_length=1)]
Prompts = Prompt | Annotated[list[Annotated[list[Token], Field(min_length=1)]], Field(min_length=1)]


class CompletionRequest(_SamplingBody):
    """`POST /v1/completions`."""

    prompt: Prompts
    max_tokens: Annotated[Whole, Field(ge=0, le=1 << 31)] | None = None
    echo: bool | None = None
    logprobs: Annotated[Whole, Field(ge=0, le=20)] | None = None
    best_of: Annotated[Whole, Field(ge=1)] | None = None
    suffix: None = None

    def decoded(self) -> TextRequest:
        """Return the request that all dialects share. Raises InvalidRequest."""
        self._check_stream()
        count = self.n or 1
        if self.best_of is not None and self.best_of != count:
            raise InvalidRequest("`best_of` is not supported: ask for `n` and choose", param="best_of")
        if self.max_tokens == 0 and not self.echo and self.prompt_logprobs is None:
            raise InvalidRequest(
                "`max_tokens` is 0: only `echo` and `prompt_logprobs` have an answer then", param="max_tokens"
            )
        prompts: list[str | tuple[int, ...]] = []
        if isinstance(self.prompt, str):
            prompts = [self.prompt]
        elif all(isinstance(each, int) for each in self.prompt):
            prompts = [tuple(each for each in self.prompt if isinstance(each, int))]
        else:
            prompts = [
                each if isinstance(each, str) else tuple(each) for each in self.prompt if not isinstance(each, int)
            ]
        if len(prompts) * count > 128:
            raise InvalidRequest("more than 128 answers to one request", param="n")
        return TextRequest(
            model=self.model,
            params=self._prompt_params(),
            stop=self._stops(),
            n=count,
            prompts=tuple(prompts),
            echo=bool(self.echo),
        )

    def _prompt_params(self) -> Params:
        """Return the parameters: `logprobs` hold for the prompt, too, where it is a part of the answer.

        The default of `max_tokens` is OpenAI's for completions, which have no end of turn to stop at.
        """
        params = self._params(self.logprobs, 16 if self.max_tokens is None else self.max_tokens)
        asked = [each for each in (self.prompt_logprobs, self.logprobs if self.echo else None) if each is not None]
        return replace(params, prompt_logprobs=max(asked, default=None))
