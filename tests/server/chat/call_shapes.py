"""Tool calls as models write them: well-formed ones, those that can be read all the same, and those that cannot."""

# ruff: noqa: E501 - a shape is read best on one line
from __future__ import annotations

from typing import Any, NamedTuple

from mlx_overlay_server.chat.requests import Tool

TOOLS = (
    Tool(
        "weather",
        "Now.",
        {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}, "units": {"type": "array"}},
            "required": ["city"],
        },
    ),
    Tool("clock", None, None),
    Tool("read_file", None, {"type": "object", "properties": {"path": {"type": "string"}}, "required": ["path"]}),
)


class Shape(NamedTuple):
    """An answer, and what it means."""

    name: str
    says: str
    calls: list[tuple[str, Any]]
    text: str = ""
    reasoning: str = ""


OSLO = ("weather", {"city": "Oslo"})
THREE = ("weather", {"city": "Oslo", "days": 3})
NOW: tuple[str, Any] = ("clock", {})
_OSLO = '{"name": "weather", "arguments": {"city": "Oslo"}}'
_NOW = '{"name": "clock", "arguments": {}}'


def _block(inside: str) -> str:
    return f"<tool_call>\n{inside}\n</tool_call>"


SHAPES = [
    # As the template asks for them.
    Shape("one block", _block(_OSLO), [OSLO]),
    Shape("text before it", f"Let me see.\n{_block(_OSLO)}", [OSLO], "Let me see.\n"),
    Shape("two blocks", f"{_block(_OSLO)}\n{_block(_NOW)}", [OSLO, NOW]),
    Shape("text after it", f"{_block(_OSLO)}\nDone.", [OSLO], "Done."),
    # Marks: missing, too many, and of other models.
    Shape("no closing mark", f"<tool_call>\n{_OSLO}", [OSLO]),
    Shape("half a closing mark", f"<tool_call>\n{_OSLO}\n</tool", [OSLO]),
    Shape("no closing mark, and text", f"<tool_call>\n{_OSLO}\nI wait.", [OSLO], "I wait."),
    Shape("no closing mark between two", f"<tool_call>\n{_OSLO}\n<tool_call>\n{_NOW}\n</tool_call>", [OSLO, NOW]),
    Shape("opened twice", f"<tool_call>\n<tool_call>\n{_OSLO}\n</tool_call>", [OSLO]),
    Shape("closed twice", f"{_block(_OSLO)}\n</tool_call>", [OSLO]),
    Shape("no opening mark", f"{_OSLO}\n</tool_call>", [OSLO]),
    Shape("a closing mark that closes nothing", "It is sunny.</tool_call>", [], "It is sunny."),
    Shape("no marks", _OSLO, [OSLO]),
    Shape("no marks, after lines", f"\n\n{_OSLO}\n", [OSLO]),
    Shape("a fence", f"```json\n{_OSLO}\n```", [OSLO]),
    Shape("a fence in a block", _block(f"```json\n{_OSLO}\n```"), [OSLO]),
    Shape("another model's marks", f"<function_call>{_OSLO}</function_call>", [OSLO]),
    Shape("the prompt's marks", f"<tools>\n{_OSLO}\n</tools>", [OSLO]),
    Shape("Mistral's mark", f"[TOOL_CALLS][{_OSLO}]", [OSLO]),
    Shape("Phi's word", f"functools[{_OSLO}]", [OSLO]),
    Shape("Llama's mark", '<|python_tag|>{"name": "weather", "parameters": {"city": "Oslo"}}', [OSLO]),
    # Several at once.
    Shape("a list in a block", _block(f"[{_OSLO}, {_NOW}]"), [OSLO, NOW]),
    Shape("lines in a block", _block(f"{_OSLO}\n{_NOW}"), [OSLO, NOW]),
    Shape("commas in a block", _block(f"{_OSLO},\n{_NOW}"), [OSLO, NOW]),
    Shape("a list without marks", f"[{_OSLO}, {_NOW}]", [OSLO, NOW]),
    Shape("lines without marks", f"{_OSLO}\n{_NOW}", [OSLO, NOW]),
    # JSON of other forms.
    Shape("parameters", _block('{"name": "weather", "parameters": {"city": "Oslo"}}'), [OSLO]),
    Shape("arguments as text", _block('{"name": "weather", "arguments": "{\\"city\\": \\"Oslo\\"}"}'), [OSLO]),
    Shape("OpenAI's envelope", _block(f'{{"type": "function", "function": {_OSLO}}}'), [OSLO]),
    Shape("the envelope without marks", f'{{"type": "function", "function": {_OSLO}}}', [OSLO]),
    Shape("a name under function", _block('{"function": "weather", "arguments": {"city": "Oslo"}}'), [OSLO]),
    Shape("the name as the key", _block('{"weather": {"city": "Oslo"}}'), [OSLO]),
    Shape("arguments first", _block('{"arguments": {"city": "Oslo"}, "name": "weather"}'), [OSLO]),
    Shape("a prefix", _block('{"name": "functions.weather", "arguments": {"city": "Oslo"}}'), [OSLO]),
    # Nearly JSON.
    Shape("a comma too many", _block('{"name": "weather", "arguments": {"city": "Oslo", "days": 3,},}'), [THREE]),
    Shape("Python's quotes", _block("{'name': 'weather', 'arguments': {'city': 'Oslo', 'days': 3}}"), [THREE]),
    Shape(
        "Python's constants",
        _block("{'name': 'weather', 'arguments': {'city': 'Oslo', 'days': None, 'units': [True, false]}}"),
        [("weather", {"city": "Oslo", "days": None, "units": [True, False]})],
    ),
    Shape("no quotes on keys", _block('{name: "weather", arguments: {city: "Oslo"}}'), [OSLO]),
    Shape("a bracket too few", _block('{"name": "weather", "arguments": {"city": "Oslo"}'), [OSLO]),
    Shape("a bracket too many", _block(f"{_OSLO}}}"), [OSLO]),
    Shape("a line end in text", _block('{"name": "read_file", "arguments": {"path": "a\nb"}}'), [("read_file", {"path": "a\nb"})]),
    Shape("marks in text", _block('{"name": "read_file", "arguments": {"path": "<b> </think>"}}'), [("read_file", {"path": "<b> </think>"})]),
    Shape("the closing mark in text", _block('{"name": "read_file", "arguments": {"path": "a</tool_call>b"}}'), [("read_file", {"path": "a</tool_call>b"})]),
    Shape("a text that is not closed, and a call", _block('{"name": "clock", "arguments": {"a": "}}') + _block(_NOW), [NOW], '{"name": "clock", "arguments": {"a": "}}'),
    Shape("no arguments, where none are needed", _block('{"name": "clock"}'), [NOW]),
    Shape("null for arguments, where none are needed", _block('{"name": "clock", "arguments": null}'), [NOW]),
    # Other ways to write a call.
    Shape("Python in a block", _block('weather(city="Oslo", days=3)'), [THREE]),
    Shape("a list of Python", _block('[weather(city="Oslo"), clock()]'), [OSLO, NOW]),
    Shape("Python without marks", 'weather(city="Oslo")', [OSLO]),
    Shape("a list of Python without marks", '[weather(city="Oslo"), clock()]', [OSLO, NOW]),
    Shape("lines of Python", 'weather(city="Oslo")\nclock()', [OSLO, NOW]),
    Shape("Python with one place", 'read_file("a.txt")', [("read_file", {"path": "a.txt"})]),
    Shape("a name and an object", _block('weather {"city": "Oslo"}'), [OSLO]),
    Shape("a name on its line", _block('weather\n{"city": "Oslo"}'), [OSLO]),
    Shape("a name and an object without marks", 'weather{"city": "Oslo"}', [OSLO]),
    Shape("Mistral's arguments", '[TOOL_CALLS]weather[ARGS]{"city": "Oslo"}', [OSLO]),
    Shape("Kimi's name", _block('functions.weather:0 {"city": "Oslo"}'), [OSLO]),
    Shape(
        "Qwen3-Coder's tags",
        _block("<function=weather>\n<parameter=city>\nOslo\n</parameter>\n<parameter=days>\n3\n</parameter>\n</function>"),
        [THREE],
    ),
    Shape("tags without marks", "<function=weather><parameter=city>Oslo</parameter></function>", [OSLO]),
    Shape("tags not closed", _block("<function=weather>\n<parameter=city>Oslo\n<parameter=days>3\n"), [THREE]),
    Shape("tags, and text", "<function=weather><parameter=city>Oslo</parameter></function>\nI wait.", [OSLO], "I wait."),
    Shape("tags after text", "I look.\n\n<function=weather>\n<parameter=city>\nOslo\n</parameter>\n</function>\n</tool_call>", [OSLO], "I look."),
    Shape("another model's marks after text", f"I look.\n<TOOLCALL>[{_OSLO}]</TOOLCALL>", [OSLO], "I look."),
    Shape("DeepSeek's marks", '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>{"city": "Oslo"}<｜tool▁call▁end｜><｜tool▁calls▁end｜>', [OSLO]),
    Shape("DeepSeek's older form", 'Hm.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n{"city": "Oslo"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>', [OSLO], "Hm."),
    Shape("a tag of another tool after text", "See <function=rm> and <function=weather.", [], "See <function=rm> and <function=weather."),
    Shape(
        "MiniMax's tags", _block('<invoke name="weather"><parameter name="city">Oslo</parameter></invoke>'), [OSLO]
    ),
    # In reasoning.
    Shape("after reasoning", f"<think>Hm.</think>{_block(_OSLO)}", [OSLO], reasoning="Hm."),
    Shape("without marks after reasoning", f"<think>Hm.</think>\n{_OSLO}", [OSLO], reasoning="Hm."),
    Shape("in reasoning", f"<think>Hm. {_block(_OSLO)}", [OSLO], reasoning="Hm. "),
    Shape("in reasoning that goes on", f"<think>Hm. {_block(_OSLO)} So.</think>Yes.", [OSLO], "Yes.", "Hm.  So."),
    Shape("no call in reasoning", "<think>Say <tool_call>x</tool_call> or so.</think>Yes.", [], "Yes.", "Say x or so."),
    # What is none.
    Shape("text", "It is sunny.", [], "It is sunny."),
    Shape("no JSON", _block("sunny"), [], "sunny"),
    Shape("nothing", "<tool_call></tool_call>", []),
    Shape("a name alone", _block('{"name": "weather"}'), [], '{"name": "weather"}'),
    Shape("another tool", _block('{"name": "rm", "arguments": {"path": "/"}}'), [], '{"name": "rm", "arguments": {"path": "/"}}'),
    Shape("another tool beside one", _block(f'[{_NOW}, {{"name": "rm", "arguments": {{}}}}]'), [], f'[{_NOW}, {{"name": "rm", "arguments": {{}}}}]'),
    Shape("another tool in Python", 'rm(path="/")', [], 'rm(path="/")'),
    Shape("Python that computes", 'weather(city="Os" + "lo")', [], 'weather(city="Os" + "lo")'),
    Shape("Python that is talked about", "weather(city) is a function.", [], "weather(city) is a function."),
    Shape("other arguments", '{"name": "weather", "arguments": {"town": "Oslo"}}', [], '{"name": "weather", "arguments": {"town": "Oslo"}}'),
    Shape("JSON that is an answer", '{"city": "Oslo", "sunny": true}', [], '{"city": "Oslo", "sunny": true}'),
    Shape("JSON that is talked about", f"Write {_OSLO} to call it.", [], f"Write {_OSLO} to call it."),
    Shape("a list that is an answer", "[1, 2]", [], "[1, 2]"),
    Shape("numbers that JSON does not have", _block('{"name": "clock", "arguments": {"at": NaN}}'), [], '{"name": "clock", "arguments": {"at": NaN}}'),
    Shape("code", "```python\nprint(1)\n```", [], "```python\nprint(1)\n```"),
]  # fmt: skip

_IN_TAGS = _block("<function=weather>\n<parameter=city>\nOslo\n</parameter>\n</function>")
_QUOTE = '<|"|>'
_KIMI = '<|tool_call_begin|>{}<|tool_call_argument_begin|>{{"city": "Oslo"}}<|tool_call_end|>'


def _kimi(*names: str, end: str = "<|tool_calls_section_end|>") -> str:
    return f"<|tool_calls_section_begin|>{''.join(map(_KIMI.format, names))}{end}"


_DSML = '<｜DSML｜{0}>\n<｜DSML｜invoke name="weather">\n<｜DSML｜parameter name="city" string="true">Oslo</｜DSML｜parameter>\n<｜DSML｜parameter name="days" string="false">3</｜DSML｜parameter>\n</｜DSML｜invoke>\n</｜DSML｜{0}>'

OF_OTHERS = [
    Shape("DeepSeek 3.2", f"I look.\n\n{_DSML.format('function_calls')}", [THREE], "I look.\n\n"),
    Shape("DeepSeek 4", _DSML.format("tool_calls"), [THREE]),
    Shape("DeepSeek 3.2, an object", '<｜DSML｜invoke name="weather">\n{"city": "Oslo"}\n</｜DSML｜invoke>', [OSLO]),
    Shape("Gemma 3", '```tool_code\nprint(default_api.weather(city="Oslo"))\n```', [OSLO]),
    Shape(
        "Gemma 3, after text", 'I look.\n```tool_code\n[weather(city="Oslo"), clock()]\n```', [OSLO, NOW], "I look.\n"
    ),
    Shape("Llama 3.1", '<function=weather>{"city": "Oslo"}</function><|eom_id|>', [OSLO]),
    Shape("Llama 3.1, its own tools", '<|python_tag|>weather.call(city="Oslo")', [OSLO]),
    Shape("Llama 4", '<|python_start|>[weather(city="Oslo", days=3)]<|python_end|>', [THREE]),
    Shape(
        "Command R7B",
        '<|START_ACTION|>[\n    {"tool_call_id": "0", "tool_name": "weather", "parameters": {"city": "Oslo"}}\n]<|END_ACTION|>',
        [OSLO],
    ),
    Shape("Phi 4", f"<|tool_call|>[{_OSLO}]<|/tool_call|>", [OSLO]),
    Shape("Granite", f"<|tool_call|>[{_OSLO}]", [OSLO]),
    Shape(
        "InternLM",
        'I look.<|action_start|><|plugin|>\n{"name": "weather", "parameters": {"city": "Oslo"}}<|action_end|>',
        [OSLO],
        "I look.",
    ),
    Shape("Apertus", '<|tools_prefix|>[{"weather": {"city": "Oslo"}}, {"clock": {}}]<|tools_suffix|>', [OSLO, NOW]),
    Shape("GigaChat", f"<|function_call|>{_OSLO}", [OSLO]),
    Shape(
        "Hunyuan",
        "<tool_calls>\n<tool_call>weather<tool_sep>\n<arg_key>city</arg_key>\n<arg_value>Oslo</arg_value>\n</tool_call>\n</tool_calls>",
        [OSLO],
    ),
    Shape("Olmo", '<function_calls>\nweather(city="Oslo")\nclock()\n</function_calls>', [OSLO, NOW]),
    Shape(
        "Seed",
        "<seed:tool_call>\n<function=weather>\n<parameter=city>Oslo</parameter>\n</function>\n</seed:tool_call>",
        [OSLO],
    ),
    Shape(
        "Muse",
        '<atem:function_calls>\n<atem:invoke name="weather">\n<atem:parameter name="city">Oslo</atem:parameter>\n</atem:invoke>\n</atem:function_calls>',
        [OSLO],
    ),
    # What is none.
    Shape("a mark that is talked about", "The tag is <tools>", [], "The tag is <tools>"),
    Shape("print of something else", "print(1)", [], "print(1)"),
]
"""Answers in the forms of other models, for which the model's own marks were never taught."""

OF_PARSERS = {
    "qwen3_coder": [
        Shape("no closing mark of the only parameter", _block("<function=weather>\n<parameter=city>\nOslo\n</function>"), [OSLO]),
        Shape("no closing mark of the last parameter", _block("<function=weather>\n<parameter=city>\nOslo\n</parameter>\n<parameter=days>\n3\n</function>"), [THREE]),
        Shape("a parameter without a name", _block("<function=weather>\n<parameter=city>Oslo</parameter>\n<parameter=\n7</parameter>\n</function>"), [OSLO]),
        Shape("two in a block", _block("<function=weather>\n<parameter=city>\nOslo\n</parameter>\n</function>\n<function=clock>\n</function>"), [OSLO, NOW]),
        Shape("no opening mark", "<function=weather>\n<parameter=city>\nOslo\n</parameter>\n</function>\n</tool_call>", [OSLO]),
        Shape("a call in text", _block(f"<function=read_file>\n<parameter=path>\n{_IN_TAGS}\n</parameter>\n</function>"), [("read_file", {"path": _IN_TAGS})]),
        Shape("a value that is not closed, and a call", _block("<function=weather>\n<parameter=city>Oslo\n") + _IN_TAGS, [OSLO, OSLO]),
        Shape("a parameter that the tool lacks", _block("<function=weather>\n<parameter=city>Oslo</parameter>\n<parameter=at>1</parameter>\n</function>"), [("weather", {"city": "Oslo", "at": "1"})]),
    ],
    "glm47": [
        Shape("white space and its own mark in text", "<tool_call>read_file\n<arg_key>path</arg_key>\n<arg_value>  a</tool_call>\nb\n</arg_value>\n</tool_call>", [("read_file", {"path": "  a</tool_call>\nb\n"})]),
        Shape("as it should be", "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Oslo</arg_value>\n</tool_call>", [OSLO]),
        Shape("no closing mark of the value", "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Oslo</arg_value>\n<arg_key>days</arg_key>\n<arg_value>3\n</tool_call>", [THREE]),
        Shape("a key closed as a value", "<tool_call>weather\n<arg_key>city</arg_value>\n<arg_value>Oslo</arg_value>\n</tool_call>", [OSLO]),
        Shape("no opening mark", "weather\n<arg_key>city</arg_key>\n<arg_value>Oslo</arg_value>\n</tool_call>", [OSLO]),
        Shape("JSON", _block(_OSLO), [OSLO]),
    ],
    "kimi_k2": [
        Shape("as it should be", _kimi("functions.weather:0", "functions.weather:1"), [OSLO, OSLO]),
        Shape("a name without a prefix", _kimi("weather"), [OSLO]),
        Shape("a name without a number", _kimi("functions.weather"), [OSLO]),
        Shape("a section that is not closed", _kimi("functions.weather:0", end=""), [OSLO]),
        Shape("no section, after text", f"Hm.{_KIMI.format('functions.weather:0')}<|tool_calls_section_end|>", [OSLO], "Hm."),
    ],
    "minimax_m2": [
        Shape("white space in text", '<minimax:tool_call>\n<invoke name="read_file">\n<parameter name="path">  a\n  b\n</parameter>\n</invoke>\n</minimax:tool_call>', [("read_file", {"path": "  a\n  b\n"})]),
        Shape("no closing mark of a parameter", '<minimax:tool_call>\n<invoke name="weather">\n<parameter name="city">Oslo\n</invoke>\n</minimax:tool_call>', [OSLO]),
        Shape("another model's marks after text", f"Hm.\n{_block(_OSLO)}", [OSLO], "Hm."),
    ],
    "mistral": [
        Shape("two calls", '[TOOL_CALLS]weather[ARGS]{"city": "Oslo"}[TOOL_CALLS]clock[ARGS]{}', [OSLO, NOW]),
        Shape("an id", '[TOOL_CALLS]weather[CALL_ID]abc123def[ARGS]{"city": "Oslo"}', [OSLO]),
        Shape("a comma too many", '[TOOL_CALLS]weather[ARGS]{"city": "Oslo",}', [OSLO]),
    ],
    "pythonic": [
        Shape("no opening mark", '[weather(city="Oslo")]<|tool_call_end|>', [OSLO]),
        Shape("no name of the argument", '<|tool_call_start|>[weather("Oslo")]<|tool_call_end|>', [OSLO]),
    ],
    "gemma4": [
        Shape("as it should be", f"<|tool_call>call:weather{{city:{_QUOTE}Oslo{_QUOTE},days:3}}<tool_call|>", [THREE]),
        Shape("spaces", f"<|tool_call>call:weather{{city: {_QUOTE}Oslo{_QUOTE}, days: 3}}<tool_call|>", [THREE]),
        Shape("a prefix", f"<|tool_call>call:google:mcp:weather{{city:{_QUOTE}Oslo{_QUOTE}}}<tool_call|>", [OSLO]),
        Shape("no opening mark", f"call:weather{{city:{_QUOTE}Oslo{_QUOTE}}}<tool_call|>", [OSLO]),
        Shape("text without quotes", "<|tool_call>call:weather{city:Oslo}<tool_call|>", [OSLO]),
        Shape("two without quotes", "<|tool_call>call:weather{city:New York, NY, days:3}<tool_call|>", [("weather", {"city": "New York, NY", "days": 3})]),
        Shape("half its quotes", f"<|tool_call>call:weather{{city:{_QUOTE}Oslo}}<tool_call|>", [OSLO]),
        Shape("brackets without quotes", "<|tool_call>call:weather{city:a}b}<tool_call|>", [], "call:weather{city:a}b}"),
        Shape("one key twice", "<|tool_call>call:weather{city:a,city:b}<tool_call|>", [], "call:weather{city:a,city:b}"),
        Shape("a key that the tool lacks", "<|tool_call>call:weather{town:Oslo}<tool_call|>", [], "call:weather{town:Oslo}"),
    ],
    "function_gemma": [
        Shape("a bracket in text", "<start_function_call>call:weather{city:<escape>a}b<escape>}<end_function_call>", [("weather", {"city": "a}b"})]),
    ],
}  # fmt: skip
"""Answers of models whose calls mlx-lm reads by other parsers, by their names."""
