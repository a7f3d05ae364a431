"""Field types that read what clients really send, each with one clear message instead of a union's many."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, PlainValidator
from pydantic_core import PydanticCustomError

from fly_jax.config import POLICIES
from fly_jax.errors import ConfigError, InvalidRequestError
from fly_jax.policy.names import policy_named
from fly_jax.sampling_params import MAX_STOP_STRINGS

logger = logging.getLogger(__name__)

MAX_PROMPTS = 1024
MAX_STOP_CHARS = 1024
MAX_ALL_STOP_CHARS = 16 * 1024
MAX_STOP_TOKEN_IDS = 1024
MAX_NAME_CHARS = 256
MAX_REMEMBERED_NAMES = 256
_MAX_INT = 2**63 - 1

Prompt = str | list[int]
Name = Annotated[str, Field(max_length=MAX_NAME_CHARS)]
# Ids are written to logs, where a line break or a control character would be somebody else's line.
PlainId = Annotated[str, Field(max_length=MAX_NAME_CHARS, pattern=r"^[\x21-\x7e]+$")]


def invalid(message: str) -> PydanticCustomError:
    """An error whose message pydantic passes on as it is; ``{}`` in what a client sent must not be a template."""
    return PydanticCustomError("invalid_value", "{reason}", {"reason": message})


def refuse_boolean(value: Any) -> Any:
    """``true`` is 1 to pydantic, and to a client a field that it has mistaken for another."""
    if isinstance(value, bool):
        raise invalid(f"must be an integer, got {str(value).lower()}")
    return value


def refuse_boolean_number(value: Any) -> Any:
    """As :func:`refuse_boolean`, for fields that take any number."""
    if isinstance(value, bool):
        raise invalid(f"must be a number, got {str(value).lower()}")
    return value


# Of a list the first error is shown: to collect those of 20,000 items takes 150 ms.
FAIL_FAST = Field(fail_fast=True)
NOT_BOOLEAN = BeforeValidator(refuse_boolean)
Integer = Annotated[int, NOT_BOOLEAN]
Int64 = Annotated[int, Field(ge=-_MAX_INT - 1, le=_MAX_INT), NOT_BOOLEAN]
FiniteFloat = Annotated[float, Field(allow_inf_nan=False), BeforeValidator(refuse_boolean_number)]


def require_text(value: Any, what: str = "value") -> str:
    """A string that UTF-8 can carry: JSON escapes can spell half a surrogate pair, tokenizers cannot read one."""
    if not isinstance(value, str):
        raise invalid(f"{what} must be a string, got {type(value).__name__}")
    if (flaw := flaw_of(value, what)) is not None:
        raise invalid(flaw)
    return value


def flaw_of(text: str, what: str) -> str | None:
    """Why UTF-8 cannot carry a string; None: it can."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return f"{what} is not valid Unicode: lone surrogate at character {error.start}"
    return None


def is_token_id(value: Any) -> bool:
    """``True`` is an int to Python and never a token id."""
    return type(value) is int


def _one_prompt(value: Any, what: str) -> Prompt:
    if isinstance(value, str):
        return require_text(value, what)  # an empty one is for the tokenizer to judge: it may begin with BOS
    if isinstance(value, list):
        if not value:
            raise invalid(f"{what} must not be empty")
        wrong = next((place for place, item in enumerate(value) if not is_token_id(item)), None)
        if wrong is None:
            return value
        raise invalid(f"{what} must hold integer token ids, got {type(value[wrong]).__name__} at {wrong}")
    raise invalid(f"{what} must be a string or a list of integer token ids")


def parse_prompts(value: Any) -> tuple[Prompt, ...]:
    """One prompt or many, as text or as token ids, always as a tuple."""
    if not isinstance(value, list) or (value and isinstance(value[0], int | float)):
        return (_one_prompt(value, "prompt"),)
    if not value:
        raise invalid("prompt must not be empty")
    if len(value) > MAX_PROMPTS:
        raise invalid(f"at most {MAX_PROMPTS} prompts in one request, got {len(value)}")
    return tuple(_one_prompt(item, f"prompt {index}") for index, item in enumerate(value))


def parse_stop(value: Any) -> tuple[str, ...]:
    """``null``, one string or a list of them."""
    if value is None:
        return ()
    strings = [value] if isinstance(value, str) else value
    if not isinstance(strings, list):
        raise invalid("stop must be a string or a list of strings")
    if len(strings) > MAX_STOP_STRINGS:
        raise invalid(f"at most {MAX_STOP_STRINGS} stop strings, got {len(strings)}")
    for text in strings:
        if not require_text(text, "a stop string"):
            raise invalid("a stop string must not be empty")
        if len(text) > MAX_STOP_CHARS:
            raise invalid(f"a stop string has at most {MAX_STOP_CHARS} characters, got {len(text)}")
    total = sum(map(len, strings))
    if total > MAX_ALL_STOP_CHARS:
        raise invalid(f"stop strings have at most {MAX_ALL_STOP_CHARS} characters together, got {total}")
    return tuple(strings)


def parse_content(value: Any) -> str:
    """A message's text; a list of text parts is joined by newlines, any other part is refused by its type."""
    if not isinstance(value, list):
        return require_text(value, "content")
    texts = []
    for index, part in enumerate(value):
        if not isinstance(part, Mapping):
            raise invalid(f"content part {index} must be an object with a type")
        if part.get("type") != "text":
            raise invalid(f"content part {index} has type {part.get('type')!r}; only 'text' is supported")
        texts.append(require_text(part.get("text"), f"text of content part {index}"))
    return "\n".join(texts)


def parse_stop_token_ids(value: list[int] | None) -> list[int] | None:
    if value is not None and len(value) > MAX_STOP_TOKEN_IDS:
        raise invalid(f"at most {MAX_STOP_TOKEN_IDS} stop token ids, got {len(value)}")
    return value


def parse_policy(value: str) -> str:
    try:
        return policy_named(value)
    except ConfigError as error:
        raise InvalidRequestError(str(error), param="policy") from None


def parse_template_kwargs(value: Any) -> dict[str, Any]:
    """Switches such as ``enable_thinking``; plain values only, and never what the server itself passes."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise invalid("chat_template_kwargs must be an object")
    for name, item in value.items():
        if not require_text(name, "a name").isidentifier() or name in RESERVED_TEMPLATE_NAMES:
            raise invalid(f"{name!r} cannot be set in chat_template_kwargs")
        if isinstance(item, str):
            require_text(item, name)
        elif not (item is None or isinstance(item, bool | int) or (isinstance(item, float) and math.isfinite(item))):
            raise invalid(f"{name} must be a string, a number, a boolean or null")
    return value


RESERVED_TEMPLATE_NAMES = frozenset(
    {
        "add_generation_prompt",
        "bos_token",
        "chat_template",
        "continue_final_message",
        "conversation",
        "documents",
        "eos_token",
        "message",
        "messages",
        "pad_token",
        "raise_exception",
        "return_dict",
        "self",
        "strftime_now",
        "template",
        "tokenize",
        "tokenizer",
        "tools",
        "unk_token",
    }
)

PromptsField = Annotated[
    tuple[Prompt, ...],
    PlainValidator(parse_prompts, json_schema_input_type=str | list[str] | list[int] | list[list[int]]),
]
StopField = Annotated[tuple[str, ...], PlainValidator(parse_stop, json_schema_input_type=str | list[str] | None)]
ContentField = Annotated[str, PlainValidator(parse_content, json_schema_input_type=str | list[dict[str, str]])]
StopTokenIdsField = Annotated[Annotated[list[Integer], FAIL_FAST] | None, AfterValidator(parse_stop_token_ids)]
PolicyField = Annotated[str, AfterValidator(parse_policy), Field(json_schema_extra={"enum": list(POLICIES)})]
TemplateKwargsField = Annotated[
    dict[str, Any], BeforeValidator(parse_template_kwargs, json_schema_input_type=dict[str, Any] | None)
]


def neutral(*values: Any) -> Callable[[Any], bool]:
    """True for the values of a field that ask for nothing; ``null`` is always one of them.

    ``true`` is no 1 and ``false`` no 0 where a number is meant.
    """

    def is_neutral(value: Any) -> bool:
        return value is None or any(
            value == item for item in values if isinstance(value, bool) <= isinstance(item, bool)
        )

    return is_neutral


_NOTHING = neutral()
_EMPTY = neutral("", [], {})
_OFF = neutral(False)

UNSUPPORTED_COMMON: Mapping[str, Callable[[Any], bool]] = {
    "allowed_token_ids": _EMPTY,
    "bad_words": _EMPTY,
    "best_of": neutral(1),
    "cache_salt": _NOTHING,
    "frequency_penalty": neutral(0),
    "guided_choice": _NOTHING,
    "guided_decoding_backend": _NOTHING,
    "guided_grammar": _NOTHING,
    "guided_json": _NOTHING,
    "guided_regex": _NOTHING,
    "include_stop_str_in_output": _OFF,
    "kv_transfer_params": _NOTHING,
    "length_penalty": neutral(1),
    "logit_bias": _EMPTY,
    "logits_processors": _EMPTY,
    "presence_penalty": neutral(0),
    "repetition_penalty": neutral(1),
    "response_format": neutral({"type": "text"}),
    "return_token_ids": _OFF,
    "spaces_between_special_tokens": neutral(True),
    "structured_outputs": _EMPTY,
    "truncate_prompt_tokens": _NOTHING,
    "use_beam_search": _OFF,
    "vllm_xargs": _EMPTY,
}
UNSUPPORTED_COMPLETION: Mapping[str, Callable[[Any], bool]] = {
    **UNSUPPORTED_COMMON,
    "prompt_embeds": _EMPTY,
    "suffix": neutral(""),
}
UNSUPPORTED_CHAT: Mapping[str, Callable[[Any], bool]] = {
    **UNSUPPORTED_COMMON,
    "audio": _NOTHING,
    "chat_template": _NOTHING,
    "continue_final_message": _OFF,
    "documents": _EMPTY,
    "echo": _OFF,
    "function_call": neutral("none", "auto"),
    "functions": _EMPTY,
    "mm_processor_kwargs": _EMPTY,
    "modalities": neutral(["text"]),
    "prediction": _NOTHING,
    "reasoning_effort": neutral("none"),
    "tool_choice": neutral("none", "auto"),
    "tools": _EMPTY,
    "web_search_options": _NOTHING,
}
# Fields of OpenAI's that change nothing about the text, so that leaving them unread is right.
HARMLESS = frozenset(
    {
        "metadata",
        "parallel_tool_calls",
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
        "verbosity",
    }
)


def refuse_unsupported(data: Mapping[str, Any], unsupported: Mapping[str, Callable[[Any], bool]]) -> None:
    """Refuses what would change the answer if it were honoured, instead of answering as if it had been.

    Raises:
        InvalidRequestError: the first such field that is not neutral.
    """
    for name, is_neutral in unsupported.items():
        if name in data and not is_neutral(data[name]):
            raise InvalidRequestError(f"{name} is not supported by this server: leave it out", param=name)


class UnknownFieldLog:
    """Says each unknown field's name once.

    OpenAI and vLLM ignore unknown fields and clients rely on that (SDKs add new ones all the time), so a typo cannot
    be an error; the log is where it can be found. Names are the client's: their number and length are bounded.
    """

    def __init__(self) -> None:
        self._seen: set[str] = set()

    def note(self, names: Collection[str], known: Collection[str]) -> None:
        if not logger.isEnabledFor(logging.DEBUG):
            return
        for name in names:
            short = ascii(name[:MAX_NAME_CHARS])
            if name not in known and short not in self._seen and len(self._seen) < MAX_REMEMBERED_NAMES:
                self._seen.add(short)
                logger.debug("ignoring the unknown request field %s", short)
