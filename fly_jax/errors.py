"""Typed errors of the public API. Every message is one line: what is wrong, both values, what to do."""

from __future__ import annotations


class FlyJaxError(Exception):
    """Base of every error that fly-jax raises on purpose."""


class ConfigError(FlyJaxError):
    """An engine option or a model's config.json is invalid or not supported."""


class LayoutError(ConfigError):
    """A layout string is malformed or does not fit the devices."""


class CheckpointError(FlyJaxError):
    """A model folder is missing, truncated, inconsistent or of an unknown format."""


class ModelTooLargeError(ConfigError):
    """The weights do not fit the device memory given, even at the widest layout."""


class CompileError(FlyJaxError):
    """An executable failed to compile or to run during warm-up."""


class InvalidRequestError(FlyJaxError):
    """A request is malformed; ``param`` names the offending field where there is one."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ContextLengthError(InvalidRequestError):
    """A prompt (plus what it must generate) is longer than the engine can hold."""

    @classmethod
    def of_prompt(cls, limit: int, tokens: str, *, hint: str = "", param: str = "prompt") -> ContextLengthError:
        """
        Args:
            limit: most tokens of prompt and output together.
            tokens: how many the prompt has.
            hint: what else may be done.
        """
        # litellm knows the error by the first words, OpenAI's, and langchain by "prompt is too long".
        message = (
            f"This model's maximum context length is {limit} tokens, but the prompt has {tokens} and needs room for "
            f"one more, so that the prompt is too long: shorten the prompt{hint}"
        )
        return cls(message, param=param)


class RequestFailedError(FlyJaxError):
    """The engine gave up on this one request; the others go on."""


class QueueFullError(FlyJaxError):
    """The engine already has as many waiting requests as it is allowed to queue."""


class ClientQueueFullError(QueueFullError):
    """One client already has as many waiting requests as one client may."""


class EngineDeadError(FlyJaxError):
    """The engine's loop has stopped; ``__cause__`` holds why."""
