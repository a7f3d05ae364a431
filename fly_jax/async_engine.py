"""The engine for asyncio: what the server uses."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator, Sequence

from fly_jax.config import EngineConfig
from fly_jax.engine.engine import Engine
from fly_jax.engine.loader import ReportProgress, load_model
from fly_jax.engine.request_rules import check_allowed
from fly_jax.engine.thread import EngineThread
from fly_jax.engine.watchdog import Watchdog
from fly_jax.errors import EngineDeadError
from fly_jax.outputs import EngineStats, RequestDelta, SwitchReport
from fly_jax.policy import Policy
from fly_jax.policy.names import policy_given, policy_named, strategy_named
from fly_jax.sampling_params import SamplingDefaults, SamplingParams
from fly_jax.text.tokenizer import Tokenizer


class AsyncEngine:
    """Streams requests through an engine that runs on its own thread.

    Args:
        engine: which belongs to this one's thread from now on.
    """

    def __init__(self, engine: Engine) -> None:
        self.config, self.served = engine.config, engine.served
        # Once: each look at the file system gives up the interpreter's lock, and every request asks for the name.
        self.model_name = self.config.model.resolve().name
        watchdog = Watchdog(self.config.engine_timeout, engine.slowest_step)
        self._thread = EngineThread(engine, watchdog)

    @classmethod
    def from_config(cls, config: EngineConfig, progress: ReportProgress | None = None) -> AsyncEngine:
        """Loads the model, which blocks until every program is compiled."""
        return cls(load_model(config, progress).engine())

    @property
    def tokenizer(self) -> Tokenizer:
        return self.served.tokenizer

    @property
    def max_model_len(self) -> int:
        return self.served.max_model_len

    @property
    def vocab_size(self) -> int:
        return self.served.vocab_size

    @property
    def sampling_defaults(self) -> SamplingDefaults:
        return self.served.sampling_defaults

    @property
    def max_num_queued_reqs(self) -> int:
        return self.config.max_num_queued_reqs

    @property
    def max_queued_per_client(self) -> int:
        return self.config.queued_per_client

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive

    @property
    def has_failed(self) -> bool:
        """It ended by itself: see the log."""
        return self._thread.has_failed

    @property
    def stuck_seconds(self) -> float | None:
        """For how long no step has finished although there is work, once that is too long; None: all is well."""
        return self._thread.watchdog.stuck_seconds()

    async def wait_failed(self) -> None:
        """Returns when the engine has ended by itself, and everybody who waited for it has been told."""
        loop, failed = asyncio.get_running_loop(), asyncio.Event()

        def tell() -> None:
            with contextlib.suppress(RuntimeError):  # the loop was closed: nobody waits any more
                loop.call_soon_threadsafe(failed.set)

        self._thread.when_failed(tell)
        await failed.wait()

    @property
    def layout(self) -> str:
        """The layout in force, whoever chose it.

        Asks the engine, which answers between two steps: on an event loop, await :meth:`stats` instead.

        Raises:
            EngineDeadError: the engine has stopped.
        """
        return self.stats_now().layout

    async def generate(
        self,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        request_id: str | None = None,
        client: str | None = None,
    ) -> AsyncIterator[RequestDelta]:
        """Yields what each step adds; closing the iterator aborts the request and frees its blocks.

        Args:
            client: whose share of the waiting places it takes, any name; None: nobody's.

        Raises:
            InvalidRequestError, ContextLengthError, QueueFullError, ClientQueueFullError: before anything is yielded.
            EngineDeadError: the engine has stopped.
        """
        check_allowed(params, self.config)  # here, so that refusing a flood of them costs the engine nothing
        request_id = request_id or f"req-{uuid.uuid4().hex}"
        loop = asyncio.get_running_loop()
        deltas: asyncio.Queue[RequestDelta | EngineDeadError] = asyncio.Queue()

        def sink(item: RequestDelta | EngineDeadError) -> None:
            with contextlib.suppress(RuntimeError):  # the loop was closed: nobody waits any more
                loop.call_soon_threadsafe(deltas.put_nowait, item)

        accepted = self._thread.submit(request_id, prompt_token_ids, params, sink, client=client)
        finished = False
        try:
            await asyncio.wrap_future(accepted)
            while not finished:
                item = await deltas.get()
                if isinstance(item, EngineDeadError):
                    finished = True
                    raise item
                finished = item.finish_reason is not None
                yield item
        finally:
            if not finished and not (accepted.done() and (accepted.cancelled() or accepted.exception())):
                self._thread.abort(request_id)

    async def abort(self, request_id: str) -> None:
        await asyncio.wrap_future(self._thread.abort(request_id))

    async def switch(self, layout: str, strategy: str | None = None, policy: str | None = None) -> SwitchReport:
        """Goes to another layout while requests run, and pins it.

        Args:
            strategy: what becomes of running requests, see :class:`fly_jax.outputs.SwitchStrategy`; None: what
                ``switch_strategy`` says.
            policy: takes over from there, as with :meth:`set_policy`; None: the layout stays pinned.

        Raises:
            LayoutError: the layout does not fit the devices.
            ConfigError: there is no such strategy or policy; or the switch was made and the policy cannot take over.
        """
        named = None if policy is None else policy_named(policy)
        return await asyncio.wrap_future(self._thread.switch(layout, strategy_named(strategy), named))

    async def set_policy(self, policy: str | Policy) -> str:
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
        return await asyncio.wrap_future(self._thread.set_policy(policy_given(policy)))

    async def stats(self) -> EngineStats:
        return await asyncio.wrap_future(self._thread.stats())

    def latest_stats(self) -> EngineStats:
        """:meth:`stats` as of the latest step or command, without asking the engine, which may be stuck.

        Raises:
            EngineDeadError: the engine has stopped.
        """
        if not self.is_alive:
            raise EngineDeadError("the engine has stopped")
        return self._thread.latest_stats

    def stats_now(self) -> EngineStats:
        """:meth:`stats` for callers outside the event loop."""
        return self._thread.stats().result()

    async def shutdown(self) -> None:
        """Aborts what is left and ends the engine.

        Raises:
            EngineDeadError: the engine is stuck, and ends with the process.
        """
        await asyncio.to_thread(self._thread.shutdown)

    def close(self) -> None:
        """:meth:`shutdown` for callers outside the event loop."""
        self._thread.shutdown()
