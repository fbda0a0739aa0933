"""The tokenizers of the models that tests make: which tokens there are, and what turns a chat into text.

Both kinds are byte-level, as most real models are, and know every byte and the same chat markers:

* a scripted model's holds one token for each step of its script, and text is encoded byte by byte. No step's
  token is ever produced by encoding text: a BPE without merges finds single bytes and no more;
* a random model's holds made-up words, which encoding finds.

A step's token is the step's bytes where that is possible, so that a program which reads the vocabulary (a grammar
that constrains what is said) finds them there. A step that says what another token says already (an earlier
step's, a byte's, a marker's) is stored as a step number between two private-use characters, then the bytes; the
decoder drops the number.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

Piece = str | bytes

BOS = "<|begin_of_text|>"
EOS = "<|im_end|>"
PAD = "<|pad|>"
TURN = "<|im_start|>"
SPECIAL = (BOS, EOS, PAD, TURN)

THINK_OPEN, _ = THINK = ("<think>", "</think>")
# Ends a prompt whose last message is a tool's answer.
AFTER_TOOL = "<|after_tool|>"


def _byte_letters() -> list[str]:
    """The character that stands for each byte in a byte-level vocabulary, as GPT-2 chose them."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = (chr(256 + number) for number in range(256))
    return [chr(byte) if byte in printable else next(others) for byte in range(256)]


# bytes 0..255 come first, so a byte is its own token id
_BYTES = tuple(_byte_letters())
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
BOS_ID, EOS_ID, PAD_ID = (len(_BYTES) + SPECIAL.index(token) for token in (BOS, EOS, PAD))

# Open and close the step number inside a step's token. Private use: what a model says may not contain them.
_MARK_OPEN, _MARK_CLOSE = _MARKS = ("\ue000", "\ue001")

_TAG = "</?(?:think|tool_call)>"

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + (message['content'] or '') + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_TOOLS = (
    "{% if tools %}{{ '<|im_start|>system\n# Tools\n\nYou may call one or more functions.\n\n<tools>' }}"
    "{% for tool in tools %}{{ '\n' + (tool | tojson) }}{% endfor %}"
    "{{ '\n</tools>\n\nFor each call, return a JSON object within <tool_call></tool_call> tags:\n<tool_call>\n"
    '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call><|im_end|>\n\' }}{% endif %}'
)
_REASONING = (
    "{% if message['role'] == 'assistant' and message.reasoning_content %}"
    "{{ '<think>' + message.reasoning_content + '</think>' }}{% endif %}"
)
_CONTENT = "{{ message['content'] or '' }}"
_RESPONSE_OR_CONTENT = (
    "{% if message['role'] == 'tool' %}{{ '<tool_response>\n' + (message['content'] or '') + '\n</tool_response>' }}"
    f"{{% else %}}{_CONTENT}{{% endif %}}"
)
# `tool_call.name` is what mlx-lm looks for. Arguments are text on OpenAI's wire, and objects where a server
# has parsed them.
_CALLS = (
    "{% for tool_call in message.tool_calls or [] %}"
    "{% if tool_call.function %}{% set tool_call = tool_call.function %}{% endif %}"
    "{{ '\n' if message['content'] or not loop.first }}"
    '{{ \'<tool_call>\n{"name": "\' + tool_call.name + \'", "arguments": \' }}'
    "{{ tool_call.arguments if tool_call.arguments is string else tool_call.arguments | tojson }}"
    "{{ '}\n</tool_call>' }}{% endfor %}"
)
_NO_THINKING = (
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
)
_AFTER_TOOL = f"{{% if messages and messages[-1]['role'] == 'tool' %}}{{{{ '{AFTER_TOOL}' }}}}{{% endif %}}"


def chat_template(*, thinks: bool, calls_tools: bool, after_tool: bool, is_brief: bool = False) -> str:
    """ChatML as Qwen writes it, with no more than what the model can do: programs guess that from the template.

    A brief one shows the beginning of each message and the names of tools: agents say 80,000 characters, which are as
    many tokens here.
    """
    if not (thinks or calls_tools or after_tool or is_brief):
        return CHAT_TEMPLATE
    whole = "".join(
        (
            "{{ bos_token }}",
            _TOOLS if calls_tools else "",
            "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}",
            _REASONING if thinks else "",
            _RESPONSE_OR_CONTENT + _CALLS if calls_tools else _CONTENT,
            "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}",
            _NO_THINKING if thinks else "",
            _AFTER_TOOL if after_tool else "",  # last, or it would not be what the prompt ends with
            "{% endif %}",
        )
    )
    if is_brief:
        return whole.replace(_CONTENT, "{{ (message['content'] or '')[:200] }}").replace(
            "(tool | tojson)", "tool.function.name"
        )
    return whole


# A scripted model's ---------------------------------------------------------------------------------------------


def split(says: str) -> list[str]:
    """Cut a text into the pieces the model says one by one: tags, and words, each with the space before it.

    Space before a tag goes with the word before it.
    """
    _refuse_marks(says)
    return re.findall(rf"{_TAG}|\s*(?:(?!{_TAG})\S)+(?:\s+(?={_TAG}))?|\s+", says)


def cut(says: str, pieces: Sequence[Piece] | None) -> list[Piece]:
    """The steps of a script: `pieces` if given."""
    if pieces is None:
        return [*split(says)]
    _refuse_marks(says)
    if b"".join(map(_encoded, pieces)) != says.encode():
        raise ValueError("the pieces do not join to the text")
    return [*pieces]


def _encoded(piece: Piece) -> bytes:
    return piece if isinstance(piece, bytes) else piece.encode()


def _refuse_marks(says: str) -> None:
    if any(mark in says for mark in _MARKS):
        raise ValueError("the text holds a character that marks step tokens")


def step_tokens(steps: Sequence[Piece], added: Sequence[str] = SPECIAL) -> list[str]:
    """The token of each step; no two steps share one.

    The first step that says a thinking tag of the vocabulary has that very token, as a real model would. No step
    brings such a tag into the vocabulary: programs would take the model for one that thinks.
    """
    taken = {"", *_BYTES, *added, *THINK}.difference(THINK if THINK_OPEN in added else ())
    tokens: list[str] = []
    for number, step in enumerate(steps):
        token = "".join(_BYTES[byte] for byte in _encoded(step))
        if token in taken:
            token = f"{_MARK_OPEN}{number}{_MARK_CLOSE}{token}"
        taken.add(token)
        tokens.append(token)
    return tokens


def vocabulary(steps: Sequence[Piece], added: Sequence[str] = SPECIAL) -> dict[str, int]:
    """Token -> id: 256 bytes, the added tokens, one token for each step that has none of these."""
    tokens = dict.fromkeys((*_BYTES, *added, *step_tokens(steps, added)))
    return {token: number for number, token in enumerate(tokens)}


def scripted_tokenizer(vocab: Mapping[str, int], added: Sequence[str]) -> dict[str, object]:
    """tokenizer.json: text is encoded byte by byte, BOS first; tokens are joined with nothing between.

    The decoder is no plain "ByteLevel", for which mlx-lm would drop a space that comes first.
    """
    drop_mark = {"type": "Replace", "pattern": {"Regex": f"^{_MARK_OPEN}[0-9]+{_MARK_CLOSE}"}, "content": ""}
    return _tokenizer(
        vocab, added, pre_tokenizer=_BYTE_LEVEL, decoder={"type": "Sequence", "decoders": [drop_mark, _BYTE_LEVEL]}
    )


# A random model's -----------------------------------------------------------------------------------------------

_SYLLABLES = tuple(consonant + vowel for consonant in "bdfghklmnprstvz" for vowel in "aeiou")


def word_vocabulary(size: int) -> dict[str, int]:
    """Token -> id: 256 bytes, the special tokens, then words, each with the space after it.

    The space comes last because mlx-lm drops one that comes first: so what a model says is exactly its words.
    """
    words = [_word(number) + _BYTES[ord(" ")] for number in range(size - len(_BYTES) - len(SPECIAL))]
    if not words:
        raise ValueError(f"a vocabulary has more than {len(_BYTES) + len(SPECIAL)} tokens")
    return {token: number for number, token in enumerate((*_BYTES, *SPECIAL, *words))}


def _word(number: int) -> str:
    """A word of two syllables or more: the number, written with syllables for digits."""
    number, last = divmod(number, len(_SYLLABLES))
    number, first = divmod(number, len(_SYLLABLES))
    return (_word(number - 1) if number else "") + _SYLLABLES[first] + _SYLLABLES[last]


def word_tokenizer(vocab: Mapping[str, int]) -> dict[str, object]:
    """tokenizer.json: a known word with the space after it is one token, everything else one for each byte.

    There are no merges: ignoring them finds words as a whole.
    """
    words = {"type": "Split", "pattern": {"Regex": "[a-z]+ "}, "behavior": "Isolated", "invert": False}
    return _tokenizer(
        vocab,
        SPECIAL,
        pre_tokenizer={"type": "Sequence", "pretokenizers": [words, _BYTE_LEVEL]},
        decoder=_BYTE_LEVEL,
        ignore_merges=True,
    )


# Both kinds' ----------------------------------------------------------------------------------------------------


def special_tokens_map() -> dict[str, object]:
    return {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD}


def tokenizer_config(added: Sequence[str], template: str, context: int) -> dict[str, object]:
    return {
        "added_tokens_decoder": {
            str(entry["id"]): {key: value for key, value in entry.items() if key != "id"}
            for entry in _added_tokens(added)
        },
        "bos_token": BOS,
        "chat_template": template,
        "clean_up_tokenization_spaces": False,
        "eos_token": EOS,
        "model_max_length": context,
        "pad_token": PAD,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


def _added_tokens(added: Sequence[str]) -> list[dict[str, object]]:
    return [
        {
            "id": len(_BYTES) + number,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": token not in THINK,  # Qwen's are not either: they are part of what is said
        }
        for number, token in enumerate(added)
    ]


def _tokenizer(
    vocab: Mapping[str, int],
    added: Sequence[str],
    *,
    pre_tokenizer: Mapping[str, object],
    decoder: Mapping[str, object],
    ignore_merges: bool = False,
) -> dict[str, object]:
    bos = {"SpecialToken": {"id": BOS, "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(added),
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, first],
            "pair": [bos, first, second],
            "special_tokens": {BOS: {"id": BOS, "ids": [BOS_ID], "tokens": [BOS]}},
        },
        "decoder": decoder,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": ignore_merges,
            "vocab": dict(vocab),
            "merges": [],
        },
    }
