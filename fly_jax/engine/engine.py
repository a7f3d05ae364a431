"""The engine: one thread's loop of schedule -> dispatch -> harvest over groups of devices."""

from __future__ import annotations

import logging
import operator
import random
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fly_jax.device.runner import InFlightStep, RowResult
from fly_jax.engine.loader import LoadedModel
from fly_jax.engine.request_rules import check_allowed
from fly_jax.engine.step_times import step_times_of
from fly_jax.errors import InvalidRequestError
from fly_jax.kv.blocks import KVCacheManager
from fly_jax.layout import DeviceGroup, Layout
from fly_jax.outputs import EngineStats, FinishReason, RequestDelta, SwitchReport, SwitchStrategy
from fly_jax.policy.adaptive import Policy
from fly_jax.policy.names import STATIC
from fly_jax.policy.observation import Machine
from fly_jax.sampling_params import SamplingParams
from fly_jax.scheduling.request import Request, RequestState, end_tokens
from fly_jax.scheduling.scheduler import Scheduler
from fly_jax.scheduling.step import StepPlan
from fly_jax.switching.control import LayoutControl
from fly_jax.switching.switch import Switch
from fly_jax.text.output_processor import OutputProcessor

logger = logging.getLogger(__name__)

# Steps of one group that may be launched and not yet harvested: one runs while the next is prepared.
STEPS_IN_FLIGHT = 2


@dataclass(frozen=True, slots=True)
class _Launched:
    """A step in flight, and the number of its launch."""

    step: InFlightStep
    number: int

    @property
    def group(self) -> DeviceGroup:
        return self.step.plan.group


class Engine:
    """Serves requests over groups of devices and changes the layout between steps.

    Not thread-safe: one thread calls every method (see :class:`fly_jax.engine.thread.EngineThread`), so that all
    launches have one total order and collectives of overlapping groups can never wait for each other in a circle.
    """

    def __init__(self, model: LoadedModel, clock: Callable[[], float] = time.perf_counter) -> None:
        """
        Args:
            clock: seconds; a simulation gives its own.
        """
        self.model = model
        self.runner = model.runner
        plan, config = model.plan, model.plan.config
        self.kv = KVCacheManager(plan.shapes.kv, len(plan.devices), plan.base_tp)
        self.scheduler = Scheduler(
            plan.layout,
            plan.limits,
            self.kv,
            max_model_len=plan.max_model_len,
            max_queued=config.max_num_queued_reqs,
            max_queued_per_client=config.queued_per_client,
            compiled=plan.groups,
            elastic=config.policy != STATIC,
        )
        machine = Machine(
            num_devices=len(plan.devices),
            base_tp=plan.base_tp,
            groups=frozenset(plan.groups),
            kv=plan.shapes.kv,
            limits=plan.limits,
            step_times=step_times_of(self.runner.executables.step_seconds),
        )
        self.control = LayoutControl(
            self.scheduler, self.runner, machine, policy=config.policy, strategy=config.switch_strategy, clock=clock
        )
        self.outputs = OutputProcessor(plan.tokenizer, plan.eos_token_ids)
        self._clock = clock
        self._depth = STEPS_IN_FLIGHT if config.overlap else 1
        self._in_flight: deque[_Launched] = deque()  # in order of launch
        self._seeds = random.Random(config.seed)
        self._finished: Counter[str] = Counter()
        self._counters: Counter[str] = Counter()
        self._compiles_at_start = model.compiles.count
        # They never change, and counting hundreds of buffers takes longer than all the other statistics.
        self._weight_bytes, self._kv_bytes = self.runner.weights.resident_bytes, self.runner.pool.nbytes

    # -- the step loop ----------------------------------------------------------------------------------------

    def step(self) -> list[RequestDelta]:
        """One pass: start what fits, launch a step on every group that can take one, read what has finished.

        Returns:
            What requests gained; empty if nothing has finished yet.
        """
        self.control.plan()
        self.scheduler.route()
        launched = self._launch_steps()
        if self.control.advance(launched, {each.group for each in self._in_flight}):
            self.scheduler.route()
            launched += self._launch_steps()
        deltas: list[RequestDelta] = []
        for step in self._ready_steps(block=not launched):
            deltas += self._harvest(step)
        self.control.settle()
        return deltas

    @property
    def slowest_step(self) -> float:
        """Seconds that the slowest program took at warm-up."""
        return max(self.runner.executables.step_seconds.values(), default=0.0)

    @property
    def steps_finished(self) -> int:
        """Steps whose results have been read."""
        return self._counters["steps_finished"]

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or bool(self._in_flight)

    @property
    def stalled(self) -> bool:
        """No step is in flight: what work there is waits for a layout, or for a command."""
        return not self._in_flight

    def _launch_steps(self) -> list[DeviceGroup]:
        plans = self._schedule()
        self.control.prepare()
        for plan in plans:
            self._dispatch(plan)
        return [plan.group for plan in plans]

    def _schedule(self) -> list[StepPlan]:
        plans = []
        launched = Counter(each.group for each in self._in_flight)
        for group in self.scheduler.groups:
            if launched[group] < self._depth and (plan := self.scheduler.schedule(group)):
                plans.append(plan)
        return plans

    def _dispatch(self, plan: StepPlan) -> None:
        step = self.runner.launch(plan)
        self._in_flight.append(_Launched(step, self.control.log.launched(plan.group)))
        self._counters["steps"] += 1

    def _ready_steps(self, block: bool) -> list[_Launched]:
        """Takes the steps whose results can be read; waits until one can if ``block``.

        A step is not read before an older one of the same request: after a switch its tokens come from steps of
        several groups, which may share no device, and their order is the text's.
        """
        ready = self._readable()
        if not ready and block and self._in_flight:
            self.runner.wait_for_any([each.step for each in self._in_flight])
            ready = self._readable() or [self._in_flight[0]]
        for each in ready:
            self._in_flight.remove(each)
        return ready

    def _readable(self) -> list[_Launched]:
        ready: list[_Launched] = []
        blocked: set[Request] = set()
        for each in self._in_flight:
            requests = [row.request for row in each.step.plan.rows]
            if blocked.isdisjoint(requests) and (self._depth == 1 or each.step.ready):
                ready.append(each)
            else:
                blocked.update(requests)
        return ready

    def _harvest(self, launched: _Launched) -> list[RequestDelta]:
        deltas = []
        self._counters["steps_finished"] += 1
        for result in self.runner.harvest(launched.step):
            if delta := self._apply(result, launched.number):
                deltas.append(delta)
        return deltas

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
        check_allowed(params, self.model.plan.config)
        min_width = params.tensor_parallel_size or 1
        self.scheduler.check(len(prompt_ids), min_width, bounded=bounded, client=client)
        prompt = self._checked_tokens(prompt_ids)
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
            end_tokens=end_tokens(params, self.outputs.eos_token_ids, self.model.plan.model_config.vocab_size),
        )
        self.outputs.add(request)
        self.scheduler.add(request)
        self.control.arrived(request)
        self._counters["prompt_tokens"] += len(prompt_ids)

    def _checked_tokens(self, prompt_ids: Sequence[int]) -> tuple[int, ...]:
        vocabulary = self.model.plan.model_config.vocab_size
        try:
            tokens = tuple(operator.index(token) for token in prompt_ids)
        except TypeError as error:
            raise InvalidRequestError(f"token ids must be integers: {error}", param="prompt") from None
        if bool in set(map(type, prompt_ids)):
            raise InvalidRequestError("token ids must be integers: got a boolean", param="prompt")
        if wrong := [token for token in tokens if not 0 <= token < vocabulary]:
            raise InvalidRequestError(f"token id {wrong[0]} is outside the vocabulary of {vocabulary}", param="prompt")
        return tokens

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
        self._finished[str(reason)] += 1
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
        scheduler, model, control = self.scheduler, self.model, self.control
        return EngineStats(
            layout=str(scheduler.layout),
            target_layout=None if control.switcher.target is None else str(control.switcher.target),
            policy=control.policy,
            strategy=str(control.strategy),
            last_decision=control.last_decision,
            decisions=dict(control.decisions),
            running=scheduler.num_running,
            paused=len(scheduler.paused),
            waiting=len(scheduler.waiting),
            kv_usage=self.kv.usage,
            free_blocks=tuple(allocator.num_free for allocator in self.kv.allocators),
            num_blocks=self.kv.spec.num_blocks,
            steps=self._counters["steps"],
            prompt_tokens=self._counters["prompt_tokens"],
            generation_tokens=self._counters["generation_tokens"],
            requests_finished=dict(self._finished),
            corrupted_requests=self._counters["corrupted_requests"],
            preemptions=scheduler.num_preemptions,
            switches={str(strategy): count for strategy, count in control.log.count.items()},
            switch_history=tuple(control.log.history),
            switch_tokens_recomputed=control.log.tokens_recomputed,
            switch_kv_bytes_moved=control.log.kv_bytes_moved,
            executables=len(self.runner.executables),
            compile_seconds=self.runner.executables.compile_seconds,
            compiles_after_warmup=model.compiles.count - self._compiles_at_start,
            weight_bytes=self._weight_bytes,
            kv_bytes=self._kv_bytes,
        )
