"""The engine: one thread's loop of schedule -> dispatch -> harvest over groups of devices."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Sequence

from fly_jax.config import EngineConfig
from fly_jax.engine.in_flight import LaunchedStep, StepsInFlight
from fly_jax.engine.request_rules import check_allowed, checked_tokens
from fly_jax.engine.served import ServedModel
from fly_jax.engine.statistics import Statistics
from fly_jax.errors import InvalidRequestError
from fly_jax.kv.blocks import KVCacheManager
from fly_jax.layout import DeviceGroup, Layout
from fly_jax.outputs import EngineStats, FinishReason, RequestDelta, SwitchReport, SwitchStrategy
from fly_jax.policy.adaptive import Policy
from fly_jax.policy.names import STATIC
from fly_jax.policy.observation import Machine
from fly_jax.sampling_params import SamplingParams
from fly_jax.scheduling.request import Request, RequestState, end_tokens
from fly_jax.scheduling.results import RowResult
from fly_jax.scheduling.runner import Runner
from fly_jax.scheduling.scheduler import Scheduler
from fly_jax.switching.control import LayoutControl
from fly_jax.switching.switch import Switch
from fly_jax.text.output_processor import OutputProcessor

logger = logging.getLogger(__name__)


class Engine:
    """Serves requests over groups of devices and changes the layout between steps.

    Not thread-safe: one thread calls every method (see :class:`fly_jax.engine.thread.EngineThread`), so that all
    launches have one total order and collectives of overlapping groups can never wait for each other in a circle.
    """

    def __init__(
        self,
        config: EngineConfig,
        served: ServedModel,
        machine: Machine,
        layout: Layout,
        runner: Runner,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """
        Args:
            layout: the first layout, of groups of the machine.
            clock: seconds; a simulation gives its own.
        """
        self.config, self.served, self.runner = config, served, runner
        self.kv = KVCacheManager(machine.kv, machine.num_devices, machine.base_tp)
        self.scheduler = Scheduler(
            layout,
            machine.limits,
            self.kv,
            max_model_len=served.max_model_len,
            max_queued=config.max_num_queued_reqs,
            max_queued_per_client=config.queued_per_client,
            compiled=machine.groups,
            elastic=config.policy != STATIC,
        )
        self.control = LayoutControl(
            self.scheduler, runner, machine, policy=config.policy, strategy=config.switch_strategy, clock=clock
        )
        self.outputs = OutputProcessor(served.tokenizer, served.eos_token_ids)
        self.in_flight = StepsInFlight(runner, overlap=config.overlap, number=self.control.log.launched)
        self.statistics = Statistics(self.scheduler, self.control, runner)
        self._counters = self.statistics.counts
        self._clock = clock
        self._seeds = random.Random(config.seed)

    # -- the step loop ----------------------------------------------------------------------------------------

    def step(self) -> list[RequestDelta]:
        """One pass: start what fits, launch a step on every group that can take one, read what has finished.

        Returns:
            What requests gained; empty if nothing has finished yet.
        """
        self.control.plan()
        self.scheduler.route()
        launched = self._launch_steps()
        if self.control.advance(launched, self.in_flight.groups):
            self.scheduler.route()
            launched += self._launch_steps()
        deltas: list[RequestDelta] = []
        for step in self.in_flight.take_ready(block=not launched):
            deltas += self._harvest(step)
        self.control.settle()
        return deltas

    @property
    def slowest_step(self) -> float:
        """Seconds that the slowest program took at warm-up."""
        return max(self.statistics.info.step_seconds.values(), default=0.0)

    @property
    def steps_finished(self) -> int:
        """Steps whose results have been read."""
        return self._counters["steps_finished"]

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or bool(self.in_flight)

    @property
    def stalled(self) -> bool:
        """No step is in flight: what work there is waits for a layout, or for a command."""
        return not self.in_flight

    def _launch_steps(self) -> list[DeviceGroup]:
        full = self.in_flight.full_groups
        groups = [group for group in self.scheduler.groups if group not in full]
        plans = [plan for group in groups if (plan := self.scheduler.schedule(group))]
        self.control.prepare()
        for plan in plans:
            self.in_flight.launch(plan)
        self._counters["steps"] += len(plans)
        return [plan.group for plan in plans]

    def _harvest(self, launched: LaunchedStep) -> list[RequestDelta]:
        self._counters["steps_finished"] += 1
        deltas = (self._apply(result, launched.number) for result in launched.read())
        return [delta for delta in deltas if delta]

    def _apply(self, result: RowResult, launch: int) -> RequestDelta | None:
        """Adds a row's results to its request; a row of a request that ended meanwhile is dropped."""
        row, request = result.row, result.row.request
        if request.finished:
            return None
        if result.failed:
            return self._fail_of_logits(request)
        if result.scores is not None:
            request.add_prompt_logprobs(result.scores, row.start)
        if result.token is None:
            return None
        request.num_pending -= 1
        request.output_ids.append(result.token.token_id)
        self._counters["generation_tokens"] += 1
        self.control.log.delivered(request, launch)
        try:
            delta = self.outputs.push(request, result.token)
        except Exception:  # a tokenizer's failure is that request's, not the engine's
            logger.exception("request %s failed", request.request_id)
            return self._end(request, FinishReason.ERROR, error="it failed inside the engine, whose log says why")
        if delta.finish_reason is not None:
            self._close(request, delta.finish_reason)
        return delta

    def _fail_of_logits(self, request: Request) -> RequestDelta:
        """Ends a request whose logits are no distribution; its KV holds NaN, which nobody else reads."""
        prompt, output = len(request.prompt_ids), len(request.output_ids)
        logger.error(
            "request %s failed: NaN or infinite logits after %d prompt and %d output tokens, on %s",
            request.request_id, prompt, output, "no group" if request.table is None else request.table.group,
        )  # fmt: skip
        self._counters["corrupted_requests"] += 1
        error = (
            f"the model gave NaN or infinite logits after {prompt} prompt and {output} output tokens, so there is no "
            "next token to sample: check the weights and the dtype"
        )
        return self._end(request, FinishReason.ERROR, error=error)

    # -- requests ---------------------------------------------------------------------------------------------

    def add_request(
        self,
        request_id: str,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        bounded: bool = True,
        client: str | None = None,
    ) -> None:
        """Queues a request.

        Args:
            bounded: refuse it when too many wait already; offline batches have no such limit.
            client: whose share of the waiting places it takes; None: nobody's.

        Raises:
            InvalidRequestError: an empty prompt, a token outside the vocabulary, a repeated id, too wide a group or
                any width where none may be asked for, a priority where requests run in order of arrival, more stop
                tokens than ``min_tokens`` can mask.
            ContextLengthError: the prompt fits no group that there could be.
            QueueFullError: too many wait already.
            ClientQueueFullError: too many of this client's wait already.
        """
        if not len(prompt_ids):
            raise InvalidRequestError("the prompt is empty: give at least one token", param="prompt")
        if request_id in self.scheduler.requests:
            raise InvalidRequestError(f"request id {request_id!r} is already in use", param="request_id")
        check_allowed(params, self.config)
        min_width = params.tensor_parallel_size or 1
        self.scheduler.check(len(prompt_ids), min_width, bounded=bounded, client=client)
        prompt = checked_tokens(prompt_ids, self.served.vocab_size)
        room = self.scheduler.max_model_len - len(prompt_ids)
        seed = params.seed if params.seed is not None else self._seeds.getrandbits(63)
        request = Request(
            request_id=request_id,
            prompt_ids=prompt,
            params=params,
            limit=room if params.max_tokens is None else min(params.max_tokens, room),
            seed=seed,
            arrival=self._clock(),
            min_width=min_width,
            priority=params.priority,
            client=client,
            end_tokens=end_tokens(params, self.served.eos_token_ids, self.served.vocab_size),
        )
        self.outputs.add(request)
        self.scheduler.add(request)
        self.control.arrived(request)
        self._counters["prompt_tokens"] += len(prompt_ids)

    def abort(self, request_id: str) -> RequestDelta | None:
        """Ends a request and frees its blocks at once; None if it is not known (any more)."""
        request = self.scheduler.requests.get(request_id)
        if request is None:
            return None
        delta = self._end(request, FinishReason.ABORT)
        self.control.settle()  # there may be no more steps
        return delta

    def _end(self, request: Request, reason: FinishReason, error: str | None = None) -> RequestDelta:
        self._close(request, reason)
        return RequestDelta(
            request.request_id,
            finish_reason=reason,
            error=error,
            num_prompt_tokens=len(request.prompt_ids),
            num_output_tokens=len(request.output_ids),
        )

    def _close(self, request: Request, reason: FinishReason) -> None:
        self.scheduler.finish(request, reason)
        self.outputs.discard(request)
        self.control.ended(request)
        self.statistics.finished[str(reason)] += 1
        assert request.state is RequestState.FINISHED

    # -- layout -----------------------------------------------------------------------------------------------

    @property
    def layout(self) -> Layout:
        return self.scheduler.layout

    @property
    def switching(self) -> bool:
        return self.control.switching

    @property
    def last_switch(self) -> SwitchReport | None:
        history = self.control.log.history
        return history[-1] if history else None

    def begin_switch(self, layout: str | Layout, strategy: SwitchStrategy | None = None) -> Switch:
        """Goes to another layout at one of the next steps, and keeps it: the policy becomes ``static``.

        Args:
            layout: its text, or what :meth:`LayoutControl.parse` made of that.
            strategy: what becomes of requests in flight; None: the configured one.

        Raises:
            LayoutError: the layout does not fit, a request does not fit it, or a switch is already under way.
        """
        target = self.control.parse(layout) if isinstance(layout, str) else layout
        return self.control.begin(target, strategy)

    def set_policy(self, policy: str | Policy) -> str:
        """Hands the layout to a policy, by name or a function of one's own; returns its canonical name.

        Raises:
            ConfigError: there is no such policy, or a function has a built-in's name.
            LayoutError: the layout cannot be kept, because a request needs a wider one.
        """
        return self.control.set_policy(policy)

    # -- observation ------------------------------------------------------------------------------------------

    def stats(self) -> EngineStats:
        return self.statistics.now()
