"""Request bodies: OpenAI's fields and vLLM's extras.

Every optional field may be an explicit ``null``. Fields that both define and this version does not implement are
refused by name when they ask for something and accepted when they do not; unknown fields are ignored, as both do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fly_jax.errors import InvalidRequestError
from fly_jax.outputs import SwitchStrategy
from fly_jax.sampling_params import MAX_LOGPROBS, SamplingDefaults, SamplingParams
from serving.fields import (
    FAIL_FAST,
    HARMLESS,
    NOT_BOOLEAN,
    UNSUPPORTED_CHAT,
    UNSUPPORTED_COMPLETION,
    ContentField,
    FiniteFloat,
    Int64,
    Integer,
    Name,
    PlainId,
    PolicyField,
    Prompt,
    PromptsField,
    StopField,
    StopTokenIdsField,
    TemplateKwargsField,
    UnknownFieldLog,
    invalid,
    refuse_unsupported,
)

MAX_N = 128
DEFAULT_COMPLETION_TOKENS = 16

T = TypeVar("T")
_unknown_fields = UnknownFieldLog()
TopLogprobs = Annotated[int, Field(ge=0, le=MAX_LOGPROBS), NOT_BOOLEAN]


def _one_of(*names: str) -> dict[str, Any]:
    """For the document: the body has at least one of these fields, and it is not null."""
    return {"anyOf": [{"required": [name], "properties": {name: {"not": {"type": "null"}}}} for name in names]}


class Body(BaseModel):
    """Base of all request bodies."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=())
    unsupported: ClassVar[Mapping[str, Callable[[Any], bool]]] = {}
    no_content: ClassVar[Mapping[str, Any]] = {}

    def without_content(self) -> Self:
        """A copy with nothing in the fields that may be large."""
        return self.model_copy(update=self.no_content)

    @model_validator(mode="before")
    @classmethod
    def _check_names(cls, data: Any) -> Any:
        if isinstance(data, dict):
            refuse_unsupported(data, cls.unsupported)
            _unknown_fields.note(data.keys(), {*cls.model_fields, *cls.unsupported, *HARMLESS})
        return data


class StreamOptions(BaseModel):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class GenerationBody(Body):
    """What both generating endpoints share."""

    prompt_field: ClassVar[str] = "prompt"

    model: str | None = None
    n: Annotated[int, Field(ge=1, le=MAX_N), NOT_BOOLEAN] | None = None
    max_tokens: Int64 | None = None
    temperature: FiniteFloat | None = None
    top_p: FiniteFloat | None = None
    top_k: Int64 | None = None
    min_p: FiniteFloat | None = None
    seed: Int64 | None = None
    stop: StopField = ()
    stop_token_ids: StopTokenIdsField = None
    ignore_eos: bool | None = None
    min_tokens: Int64 | None = None
    skip_special_tokens: bool | None = None
    prompt_logprobs: TopLogprobs | None = None
    return_tokens_as_token_ids: bool | None = None
    priority: Int64 | None = None
    tensor_parallel_size: Int64 | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    request_id: PlainId | None = None
    user: str | None = None

    @model_validator(mode="after")
    def _check_stream_options(self) -> Self:
        if self.stream_options is not None and self.stream_options.model_fields_set and not self.stream:
            raise InvalidRequestError("stream_options needs stream: true", param="stream_options")
        return self

    @model_validator(mode="after")
    def _check_prompt_logprobs(self) -> Self:
        if self.prompt_logprobs is not None and self.stream:
            reason = "prompt_logprobs is not available with stream: true; leave one of them out"
            raise InvalidRequestError(reason, param="prompt_logprobs")
        return self

    @property
    def choices_per_prompt(self) -> int:
        return self.n or 1

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        """As in vLLM, usage in every chunk is a refinement of usage at the end."""
        return self.include_usage and bool(self.stream_options and self.stream_options.continuous_usage_stats)

    def _sampling(
        self, defaults: SamplingDefaults, *, max_tokens: int | None, logprobs: int | None, prompt_logprobs: int | None
    ) -> SamplingParams:
        return SamplingParams(
            max_tokens=defaults.capped(max_tokens),
            temperature=_given(self.temperature, defaults.temperature),
            top_k=_given(self.top_k, defaults.top_k),
            top_p=_given(self.top_p, defaults.top_p),
            min_p=_given(self.min_p, defaults.min_p),
            seed=self.seed,
            stop=self.stop,
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=bool(self.ignore_eos),
            min_tokens=_given(self.min_tokens, 0),
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            skip_special_tokens=_given(self.skip_special_tokens, True),
            priority=_given(self.priority, 0),
            tensor_parallel_size=self.tensor_parallel_size,
        )


class CompletionRequest(GenerationBody):
    """``POST /v1/completions``."""

    unsupported: ClassVar[Mapping[str, Callable[[Any], bool]]] = UNSUPPORTED_COMPLETION
    no_content: ClassVar[Mapping[str, Any]] = {"prompt": ()}

    prompt: PromptsField
    logprobs: TopLogprobs | None = None
    echo: bool | None = None
    add_special_tokens: bool | None = None

    @property
    def prompts(self) -> tuple[Prompt, ...]:
        return self.prompt

    @property
    def only_prompt(self) -> bool:
        """``echo`` with ``max_tokens: 0`` scores a prompt and generates nothing."""
        return bool(self.echo) and self.max_tokens == 0

    def sampling_params(self, defaults: SamplingDefaults) -> SamplingParams:
        """The engine generates at least one token, so scoring alone asks for one and drops it.

        Raises:
            InvalidRequestError: a field is out of range; ``param`` names it.
        """
        return self._sampling(
            defaults,
            max_tokens=1 if self.only_prompt else _given(self.max_tokens, DEFAULT_COMPLETION_TOKENS),
            logprobs=self.logprobs,
            prompt_logprobs=self._scored,
        )

    @property
    def _scored(self) -> int | None:
        """Alternatives of the prompt's tokens, for ``prompt_logprobs`` and for an echo with log-probabilities."""
        wanted = (self.prompt_logprobs, self.logprobs if self.echo else None)
        return max((count for count in wanted if count is not None), default=None)


class ChatMessage(BaseModel):
    """One turn; its content is plain text once it is here."""

    role: Literal["system", "developer", "user", "assistant"]
    content: ContentField
    name: Name | None = None

    @model_validator(mode="before")
    @classmethod
    def _check_shape(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        for name in ("tool_calls", "function_call", "audio"):
            if data.get(name):
                raise invalid(f"{name} in a message is not supported")
        if data.get("role") == "assistant" and data.get("content") is None:
            return {**data, "content": ""}
        return data

    def for_template(self) -> dict[str, Any]:
        """``developer`` is OpenAI's newer name for ``system``; models' templates know only the older one."""
        role = "system" if self.role == "developer" else self.role
        message = {"role": role, "content": self.content}
        return message if self.name is None else {**message, "name": self.name}


class ChatCompletionRequest(GenerationBody):
    """``POST /v1/chat/completions``."""

    unsupported: ClassVar[Mapping[str, Callable[[Any], bool]]] = UNSUPPORTED_CHAT
    prompt_field: ClassVar[str] = "messages"
    no_content: ClassVar[Mapping[str, Any]] = {"messages": []}

    messages: Annotated[list[ChatMessage], Field(min_length=1), FAIL_FAST]
    max_completion_tokens: Int64 | None = None
    logprobs: bool | None = None
    top_logprobs: TopLogprobs | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: TemplateKwargsField = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check_logprobs(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequestError("top_logprobs needs logprobs: true", param="top_logprobs")
        return self

    def sampling_params(self, defaults: SamplingDefaults) -> SamplingParams:
        """Without a limit a chat answer may fill the context; ``max_completion_tokens`` is the newer name and wins.

        Raises:
            InvalidRequestError: a field is out of range; ``param`` names it.
        """
        return self._sampling(
            defaults,
            max_tokens=self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens,
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            prompt_logprobs=self.prompt_logprobs,
        )


class TokenizeRequest(Body):
    """``POST /tokenize``: either a text or messages."""

    model_config = ConfigDict(json_schema_extra=_one_of("prompt", "messages"))
    no_content: ClassVar[Mapping[str, Any]] = {"prompt": "", "messages": None}

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], FAIL_FAST] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: TemplateKwargsField = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check_one_given(self) -> Self:
        if (self.prompt is None) == (not self.messages):
            raise InvalidRequestError("give either prompt or messages", param="prompt")
        return self


class DetokenizeRequest(Body):
    """``POST /detokenize``."""

    no_content: ClassVar[Mapping[str, Any]] = {"tokens": []}

    model: str | None = None
    tokens: Annotated[list[Integer], FAIL_FAST]


class LayoutRequest(Body):
    """``POST /layout``: a layout to go to, who chooses the next ones, or both.

    Attributes:
        strategy: of this switch; null: the server's ``--switch-strategy``.
        policy: in force afterwards; null: ``static`` after a switch, since asking for a layout pins it.
    """

    # An option of an operator that is misspelled must not pass for one left out.
    model_config = ConfigDict(extra="forbid", protected_namespaces=(), json_schema_extra=_one_of("layout", "policy"))

    layout: Name | None = None
    strategy: SwitchStrategy | None = None
    policy: PolicyField | None = None

    @model_validator(mode="after")
    def _check_something_is_asked_for(self) -> Self:
        if self.layout is None and self.strategy is not None:
            reason = (
                "strategy is how one switch is made: give the layout to go to with it, or leave it out; "
                "--switch-strategy sets the default when the server starts"
            )
            raise InvalidRequestError(reason, param="strategy")
        if self.layout is None and self.policy is None:
            raise InvalidRequestError("give a layout to go to (2+2), or a policy (auto or static)", param="layout")
        return self


def _given(value: T | None, default: T) -> T:
    """An explicit null means the default, as a missing field does."""
    return default if value is None else value
