"""A model's chat template: Jinja in a sandbox, with bounds on output, values and time."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from fly_jax.errors import CheckpointError, InvalidRequestError
from fly_jax.host.json_files import read_json

MAX_TEMPLATE_OUTPUT = 4 * 1024 * 1024
MAX_TEMPLATE_SECONDS = 3.0
_MAX_INTEGER_BITS = 1 << 16

# As in transformers: ``is not none``, by which templates ask for them, holds for a name that is not defined.
_NOT_GIVEN = {"tools": None, "documents": None}
_TIMED_FILTER = "fly_jax_timed"
# In seconds of this thread's CPU time, so that a busy machine refuses nothing that an idle one renders.
_deadline: ContextVar[float] = ContextVar("deadline")


class ChatTemplate:
    """A compiled Jinja template: no attribute access to internals, no mutation, bounded output and time."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        environment = _Environment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationExtension]
        )
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        environment.filters["tojson"] = _to_json
        try:
            self._compiled = environment.from_string(source)
        except (TemplateError, RecursionError) as error:
            raise CheckpointError(f"the model's chat template is not valid Jinja: {error}") from error
        self._source, self._special_tokens = source, special_tokens

    def __reduce__(self) -> tuple[type[ChatTemplate], tuple[str, Mapping[str, str]]]:
        """A compiled template cannot be pickled; its source can."""
        return type(self), (self._source, self._special_tokens)

    @classmethod
    def load(cls, folder: Path, special_tokens: Mapping[str, str]) -> ChatTemplate | None:
        """From ``chat_template.jinja`` or ``tokenizer_config.json``, None where neither has one.

        Raises:
            CheckpointError: the template is damaged.
        """
        config_path, file = folder / "tokenizer_config.json", folder / "chat_template.jinja"
        config = read_json(config_path) if config_path.exists() else {}
        source = _read_text(file) if file.exists() else _configured(config, config_path)
        return None if source is None else cls(source, special_tokens)

    def render(self, messages: Sequence[dict[str, Any]], **variables: Any) -> str:
        """The prompt.

        Raises:
            InvalidRequestError: the template refuses the messages, or exceeds a bound with them.
        """
        previous = _deadline.set(time.thread_time() + MAX_TEMPLATE_SECONDS)
        try:
            return self._render(**{**_NOT_GIVEN, **self._special_tokens, **variables, "messages": list(messages)})
        except InvalidRequestError:
            raise
        except Exception as error:  # what a template can run into has no bound: division by zero, endless recursion
            raise InvalidRequestError(f"the chat template refused the messages: {error}", param="messages") from error
        finally:
            _deadline.reset(previous)

    def _render(self, **variables: Any) -> str:
        pieces, size = [], 0
        for piece in self._compiled.generate(**variables):
            pieces.append(piece)
            size += len(piece)
            if size > MAX_TEMPLATE_OUTPUT:
                raise _exceeds(f"wrote more than {MAX_TEMPLATE_OUTPUT} characters")
        return "".join(pieces)


class _CodeGenerator(CodeGenerator):
    """Puts a clock into every loop, and a bound on what ``~`` joins: Jinja intercepts neither by itself."""

    def visit_Template(self, node: nodes.Template, frame: Frame | None = None) -> None:
        for loop in list(node.find_all(nodes.For)):
            loop.iter = nodes.Filter(loop.iter, _TIMED_FILTER, [], [], None, None, lineno=loop.lineno)
        node.set_environment(self.environment)
        super().visit_Template(node, frame)

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.bounded(")
        super().visit_Concat(node, frame)
        self.write(")")


class _Environment(ImmutableSandboxedEnvironment):
    """A sandbox in which loops, macros and recursion end at the deadline and operators make no huge value.

    A single filter or method call is not interrupted, and what a filter gives is not measured: the template comes with
    the model, and only messages and variables from strangers.
    """

    code_generator_class = _CodeGenerator
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.filters[_TIMED_FILTER] = _Timed

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        _check_time()
        return __self.bounded(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            for sequence, count in ((left, right), (right, left)):
                if isinstance(sequence, str | list | tuple) and isinstance(count, int):
                    _check_size(len(sequence) * count)
        if operator == "**" and isinstance(left, int) and isinstance(right, int):
            _check_bits(left.bit_length() * right)
        return self.bounded(super().call_binop(context, operator, left, right))

    @staticmethod
    def bounded(value: Any) -> Any:
        """The value, unless it is too large."""
        if isinstance(value, str | bytes | list | tuple):
            _check_size(len(value))
        elif isinstance(value, int):
            _check_bits(value.bit_length())
        return value


class _Timed:
    """What a loop iterates over, with a look at the clock at each item."""

    def __init__(self, items: Any) -> None:
        self._items: Iterable[Any] = items

    def __len__(self) -> int:
        return len(self._items)  # type: ignore[arg-type]  # a TypeError is what Jinja expects of a generator

    def __iter__(self) -> Iterator[Any]:
        for item in self._items:
            _check_time()
            yield item


class _GenerationExtension(Extension):
    """``{% generation %}``, by which transformers finds the assistant's tokens in training: its body is written out."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own declaration

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _check_time() -> None:
    if time.thread_time() > _deadline.get():
        raise _exceeds(f"took more than {MAX_TEMPLATE_SECONDS:g} s")


def _check_size(size: int) -> None:
    if size > MAX_TEMPLATE_OUTPUT:
        raise _exceeds(f"made a value of more than {MAX_TEMPLATE_OUTPUT} elements")


def _check_bits(bits: int) -> None:
    if bits > _MAX_INTEGER_BITS:
        raise _exceeds(f"made an integer of more than {_MAX_INTEGER_BITS} bits")


def _exceeds(what: str) -> InvalidRequestError:
    return InvalidRequestError(f"the chat template {what}: shorten the messages", param="messages")


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read as UTF-8 text ({error}): fetch the file again") from error


def _configured(config: dict[str, Any], path: Path) -> str | None:
    """The template in ``tokenizer_config.json``; of several named ones the default."""
    source = config.get("chat_template")
    if isinstance(source, list):
        if any(not isinstance(entry, dict) or {"name", "template"} - entry.keys() for entry in source):
            raise CheckpointError(f"{path}: every entry of chat_template must have a name and a template")
        source = next((entry["template"] for entry in source if entry["name"] == "default"), None)
    if source is not None and not isinstance(source, str):
        raise CheckpointError(f"{path}: chat_template must be text or a list of templates, not {type(source).__name__}")
    return source


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(format: str) -> str:
    """The local time, as transformers gives it to templates that state the date."""
    return datetime.now().strftime(format)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As in transformers, so that templates may pass the same arguments; unlike Jinja's own, it escapes no HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
