"""The engine for scripts and notebooks."""

from __future__ import annotations

import queue
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from fly_jax.config import EngineConfig
from fly_jax.errors import EngineDeadError, InvalidRequestError, RequestFailedError
from fly_jax.logprobs import TokenLogprob
from fly_jax.outputs import EngineStats, RequestDelta, RequestOutput, SwitchReport
from fly_jax.platform import DEFAULT_DEVICES, configure_devices
from fly_jax.policy.names import policy_given, policy_named, strategy_named
from fly_jax.progress import GenerationProgress, LoadProgress
from fly_jax.sampling_params import SamplingParams

if TYPE_CHECKING:
    from fly_jax.logprobs import PromptLogprobs
    from fly_jax.models.config import ModelConfig
    from fly_jax.policy import Policy

Prompt = str | Sequence[int]


class LLM:
    """A loaded model that generates, scores and changes its layout.

    >>> with LLM("checkpoints/demo/model", devices=4, layout="dp4") as llm:
    ...     llm.generate("Once upon a time", SamplingParams(max_tokens=40))
    ...     llm.switch("tp4")

    Args:
        model: a Hugging Face folder or one made by ``fly-jax convert``.
        devices: how many devices; on CPU that many virtual ones are made, if jax has not started yet.
        layout: the first layout.
        progress: show progress bars.
        options: every other field of :class:`fly_jax.config.EngineConfig`.

    Raises:
        ConfigError, LayoutError, CheckpointError, ModelTooLargeError: one line that says what to do.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        devices: int | None = None,
        layout: str | None = None,
        progress: bool = True,
        **options: Any,
    ) -> None:
        configure_devices(devices or DEFAULT_DEVICES)
        from fly_jax.engine.loader import load_model  # jax starts here, after its devices are configured
        from fly_jax.engine.thread import EngineThread

        config = EngineConfig(model=Path(model), devices=devices, layout=layout, **options)
        with LoadProgress(enabled=progress) as bar:
            loaded = load_model(config, bar.report)
        self._progress = progress
        self._plan = loaded.plan
        self._thread = EngineThread(loaded.engine())
        self.tokenizer = loaded.plan.tokenizer

    def generate(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[RequestOutput]:
        """Completes one prompt or many, text or token ids; results in the order of the prompts.

        Args:
            params: None: :meth:`get_default_sampling_params`.

        Raises:
            InvalidRequestError, ContextLengthError: a prompt or its params are refused; the others are aborted.
        """
        listed = _as_list(prompts)
        each = (
            [params or self.get_default_sampling_params()] * len(listed)
            if not isinstance(params, Sequence)
            else list(params)
        )
        if len(each) != len(listed):
            raise InvalidRequestError(f"{len(each)} params for {len(listed)} prompts: give one, or one a prompt")
        pending = [_Pending(self._encode(prompt), prompt if isinstance(prompt, str) else None) for prompt in listed]
        return self._run(pending, each)

    def score(self, token_ids: Sequence[int]) -> np.ndarray:
        """Teacher-forced log-probabilities, float32 ``[len(token_ids) - 1]``: entry i is token i + 1's.

        Raises:
            InvalidRequestError, ContextLengthError: the tokens are refused.
            RequestFailedError: their logits are NaN or infinite.
        """
        params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, ignore_eos=True)
        (output,) = self._run([_Pending(tuple(token_ids), None)], [params], show=False)
        if output.error is not None:
            raise RequestFailedError(output.error)
        assert output.prompt_logprobs is not None
        return output.prompt_logprobs.logprobs

    def switch(self, layout: str, strategy: str | None = None, policy: str | None = None) -> SwitchReport:
        """Changes the layout and pins it; callable from another thread while :meth:`generate` runs.

        Args:
            strategy: what becomes of running requests, see :class:`fly_jax.outputs.SwitchStrategy`; None: what
                ``switch_strategy`` says.
            policy: takes over from there, as with :meth:`set_policy`; None: the layout stays pinned.

        Raises:
            LayoutError: the layout does not fit the devices.
            ConfigError: there is no such strategy or policy; or the switch was made and the policy cannot take over.
        """
        named = None if policy is None else policy_named(policy)
        return self._thread.switch(layout, strategy_named(strategy), named).result()

    def set_policy(self, policy: str | Policy) -> str:
        """Hands the choice of the layout to the engine (``auto``) or a function, or pins the one in force (``static``).

        Args:
            policy: a name, or a :data:`fly_jax.policy.Policy`: a function of a :class:`fly_jax.policy.Load` and a
                :class:`fly_jax.policy.Machine` that returns a :class:`fly_jax.policy.Decision`. The engine's thread
                calls it every few steps while there is work, so it should take well under a millisecond. One that
                fails, or asks for a layout that cannot be switched to, gives way to ``load_adaptive``.

        Returns:
            The policy now in force: ``load_adaptive``, ``static`` or the function's name.

        Raises:
            ConfigError: there is no such policy, the engine cannot follow it, or a function has a built-in's name.
        """
        return self._thread.set_policy(policy_given(policy)).result()

    def get_default_sampling_params(self) -> SamplingParams:
        """What the model's generation_config.json recommends, see ``generation_config``."""
        return self._plan.sampling_defaults.params()

    @property
    def max_model_len(self) -> int:
        """Most tokens one request may hold, prompt and output."""
        return self._plan.max_model_len

    @property
    def model_config(self) -> ModelConfig:
        return self._plan.model_config

    @property
    def layout(self) -> str:
        """Canonical text of the layout in force, whoever chose it."""
        return self.stats().layout

    def stats(self) -> EngineStats:
        return self._thread.stats().result()

    def shutdown(self) -> None:
        """Ends the engine and gives its memory back; safe to call twice."""
        self._thread.shutdown()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.shutdown()

    def _encode(self, prompt: Prompt) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(prompt)) if isinstance(prompt, str) else tuple(prompt)

    def _run(self, pending: list[_Pending], params: list[SamplingParams], show: bool = True) -> list[RequestOutput]:
        deltas: queue.SimpleQueue[RequestDelta | EngineDeadError] = queue.SimpleQueue()
        by_id = {f"llm-{uuid.uuid4().hex}": item for item in pending}
        try:
            accepted = [
                self._thread.submit(request_id, item.prompt_ids, each, deltas.put, bounded=False)
                for (request_id, item), each in zip(by_id.items(), params, strict=True)
            ]
            for future in accepted:
                future.result()
            with GenerationProgress(len(pending), enabled=self._progress and show) as bar:
                unfinished = len(pending)
                while unfinished:
                    delta = deltas.get()
                    if isinstance(delta, EngineDeadError):
                        raise delta
                    by_id[delta.request_id].add(delta)
                    unfinished -= delta.finish_reason is not None
                    bar.update(tokens=len(delta.token_ids), finished=delta.finish_reason is not None)
        except BaseException:
            for request_id in by_id:
                self._thread.abort(request_id)
            raise
        return [item.output(request_id) for request_id, item in by_id.items()]


class _Pending:
    """A request that is being collected."""

    def __init__(self, prompt_ids: tuple[int, ...], prompt: str | None) -> None:
        self.prompt_ids, self.prompt = prompt_ids, prompt
        self._text: list[str] = []
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprob] = []
        self._prompt_logprobs: PromptLogprobs | None = None
        self._last: RequestDelta | None = None

    def add(self, delta: RequestDelta) -> None:
        self._text.append(delta.text)
        self._token_ids.extend(delta.token_ids)
        self._logprobs.extend(delta.logprobs)
        self._prompt_logprobs = delta.prompt_logprobs if delta.prompt_logprobs is not None else self._prompt_logprobs
        self._last = delta

    def output(self, request_id: str) -> RequestOutput:
        assert self._last is not None
        assert self._last.finish_reason is not None
        return RequestOutput(
            request_id=request_id,
            prompt=self.prompt,
            prompt_token_ids=self.prompt_ids,
            text="".join(self._text),
            token_ids=tuple(self._token_ids),
            logprobs=tuple(self._logprobs),
            prompt_logprobs=self._prompt_logprobs,
            finish_reason=self._last.finish_reason,
            stop_reason=self._last.stop_reason,
            error=self._last.error,
        )


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    items: Iterable[Any] = list(prompts)
    if items and all(isinstance(item, (int, np.integer)) for item in items):
        return [tuple(item if isinstance(item, bool) else int(item) for item in items)]
    return list(items)
