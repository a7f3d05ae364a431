"""The engine: one thread's loop of schedule -> dispatch -> harvest over groups of devices."""

from __future__ import annotations

import logging
import operator
import random
import time
from collections import Counter, deque
from collections.abc import Sequence

from fly_jax.errors import InvalidRequestError, LayoutError
from fly_jax.group_scheduler import StepPlan
from fly_jax.kv_cache import KVCacheManager
from fly_jax.layout import Layout
from fly_jax.loader import LoadedModel
from fly_jax.migration import MigrationTotals
from fly_jax.output_processor import OutputProcessor
from fly_jax.outputs import EngineStats, FinishReason, RequestDelta, SwitchReport, SwitchStrategy
from fly_jax.request import Request, RequestState
from fly_jax.runner import InFlightStep, RowResult
from fly_jax.sampling_params import SamplingParams
from fly_jax.scheduler import Scheduler

logger = logging.getLogger(__name__)

# Steps of one group that may be launched and not yet harvested: one runs while the next is prepared.
STEPS_IN_FLIGHT = 2


class Engine:
    """Serves requests over groups of devices and changes the layout between steps.

    Not thread-safe: one thread calls every method (see :class:`fly_jax.engine_thread.EngineThread`), so that all
    launches have one total order and collectives of overlapping groups can never wait for each other in a circle.
    """

    def __init__(self, model: LoadedModel) -> None:
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
        )
        self.outputs = OutputProcessor(plan.tokenizer, plan.eos_token_ids)
        self._depth = STEPS_IN_FLIGHT if config.overlap else 1
        self._in_flight: deque[InFlightStep] = deque()  # in order of launch
        self._seeds = random.Random(config.seed)
        self._switch_started = 0.0
        self._finished: Counter[str] = Counter()
        self._counters: Counter[str] = Counter()
        self._last_switch: SwitchReport | None = None
        self._compiles_at_start = model.compiles.count

    # -- the step loop ----------------------------------------------------------------------------------------

    def step(self) -> list[RequestDelta]:
        """One pass: start what fits, launch a step on every group that can take one, read what has finished.

        Returns:
            What requests gained; empty if nothing has finished yet.
        """
        self.scheduler.route()
        launched = [self._dispatch(plan) for plan in self._schedule()]
        deltas: list[RequestDelta] = []
        for step in self._ready_steps(block=not launched):
            deltas += self._harvest(step)
        self._switch_if_drained()
        return deltas

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or bool(self._in_flight)

    def _schedule(self) -> list[StepPlan]:
        plans = []
        launched = Counter(step.plan.group for step in self._in_flight)
        for group in self.scheduler.groups:
            if launched[group] < self._depth and (plan := self.scheduler.schedule(group)):
                plans.append(plan)
        return plans

    def _dispatch(self, plan: StepPlan) -> InFlightStep:
        step = self.runner.launch(plan)
        self._in_flight.append(step)
        self._counters["steps"] += 1
        return step

    def _ready_steps(self, block: bool) -> list[InFlightStep]:
        """Takes the steps whose results can be read; waits until one can if ``block``.

        A step is not read before an older one of the same request: after a switch its tokens come from steps of
        several groups, which may share no device, and their order is the text's.
        """
        ready = self._readable()
        if not ready and block and self._in_flight:
            self.runner.wait_for_any(self._in_flight)
            ready = self._readable() or [self._in_flight[0]]
        for step in ready:
            self._in_flight.remove(step)
        return ready

    def _readable(self) -> list[InFlightStep]:
        ready: list[InFlightStep] = []
        blocked: set[Request] = set()
        for step in self._in_flight:
            requests = [row.request for row in step.plan.rows]
            if blocked.isdisjoint(requests) and (self._depth == 1 or step.ready):
                ready.append(step)
            else:
                blocked.update(requests)
        return ready

    def _harvest(self, step: InFlightStep) -> list[RequestDelta]:
        deltas = []
        for result in self.runner.harvest(step):
            if delta := self._apply(result):
                deltas.append(delta)
        return deltas

    def _apply(self, result: RowResult) -> RequestDelta | None:
        """Adds a row's results to its request; a row of a request that ended meanwhile is dropped."""
        row, request = result.row, result.row.request
        if request.finished:
            return None
        fresh = len(request.prompt_logprobs) - row.start  # a recomputed prompt is scored again
        request.prompt_logprobs.extend(result.scores[max(0, fresh) :])
        if result.token is None:
            return None
        request.num_pending -= 1
        request.output_ids.append(result.token.token_id)
        self._counters["generation_tokens"] += 1
        try:
            delta = self.outputs.push(request, result.token)
        except Exception as error:  # a tokenizer's failure is that request's, not the engine's
            logger.exception("request %s failed", request.request_id)
            return self._end(request, FinishReason.ERROR, error=f"{type(error).__name__}: {error}")
        if delta.finish_reason is not None:
            self._close(request, delta.finish_reason)
        return delta

    # -- requests ---------------------------------------------------------------------------------------------

    def add_request(
        self, request_id: str, prompt_ids: Sequence[int], params: SamplingParams, *, bounded: bool = True
    ) -> None:
        """Queues a request.

        Args:
            bounded: refuse it when too many wait already; offline batches have no such limit.

        Raises:
            InvalidRequestError: an empty prompt, a token outside the vocabulary, a repeated id.
            ContextLengthError: the prompt fits no group of the layout.
            QueueFullError: too many wait already.
        """
        if not len(prompt_ids):
            raise InvalidRequestError("the prompt is empty: give at least one token", param="prompt")
        if request_id in self.scheduler.requests:
            raise InvalidRequestError(f"request id {request_id!r} is already in use", param="request_id")
        self.scheduler.check(len(prompt_ids), bounded=bounded)
        prompt = self._checked_tokens(prompt_ids)
        room = self.scheduler.max_model_len - len(prompt_ids)
        seed = params.seed if params.seed is not None else self._seeds.getrandbits(63)
        request = Request(
            request_id=request_id,
            prompt_ids=prompt,
            params=params,
            max_tokens=room if params.max_tokens is None else min(params.max_tokens, room),
            seed=seed,
            arrival=time.monotonic(),
        )
        self.outputs.add(request)
        self.scheduler.add(request)
        self._counters["prompt_tokens"] += len(prompt_ids)

    def _checked_tokens(self, prompt_ids: Sequence[int]) -> tuple[int, ...]:
        vocabulary = self.model.plan.model_config.vocab_size
        try:
            tokens = tuple(operator.index(token) for token in prompt_ids)
        except TypeError as error:
            raise InvalidRequestError(f"token ids must be integers: {error}", param="prompt") from None
        if wrong := [token for token in tokens if not 0 <= token < vocabulary]:
            raise InvalidRequestError(f"token id {wrong[0]} is outside the vocabulary of {vocabulary}", param="prompt")
        return tokens

    def abort(self, request_id: str) -> RequestDelta | None:
        """Ends a request and frees its blocks at once; None if it is not known (any more)."""
        request = self.scheduler.requests.get(request_id)
        return None if request is None else self._end(request, FinishReason.ABORT)

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
        self._finished[str(reason)] += 1
        assert request.state is RequestState.FINISHED

    # -- layout -----------------------------------------------------------------------------------------------

    @property
    def layout(self) -> Layout:
        return self.scheduler.layout

    @property
    def switching(self) -> bool:
        return self.scheduler.target is not None

    @property
    def last_switch(self) -> SwitchReport | None:
        return self._last_switch

    def parse_layout(self, text: str) -> Layout:
        """A layout that can be switched to.

        Raises:
            LayoutError: the text does not fit the devices, or programs for it were not compiled.
        """
        layout = Layout.parse(text, len(self.model.plan.devices), self.model.plan.base_tp)
        if missing := [str(group) for group in layout.groups if group not in self.model.plan.groups]:
            raise LayoutError(
                f"layout {layout} needs {', '.join(missing)}, which --layouts left out: start again with {layout} in it"
            )
        return layout

    def begin_switch(self, text: str, strategy: SwitchStrategy = SwitchStrategy.MIGRATE) -> Layout:
        """Goes to another layout: at once, or with ``SEQUENTIAL`` once the groups concerned have drained.

        Raises:
            LayoutError: the layout does not fit, a request does not fit it, or a switch is already under way.
        """
        target, source = self.parse_layout(text), self.layout
        started = time.perf_counter()
        if strategy is SwitchStrategy.MIGRATE:
            totals = self.scheduler.migrate(target, self.runner.relayout)
            self._report_switch(source, strategy, 0.0, time.perf_counter() - started, totals)
        else:
            self.scheduler.begin_switch(target)
            self._switch_started = started
            logger.info("switch %s -> %s: draining %s", source, target, [str(g) for g in self.scheduler.dissolving])
        return target

    def _switch_if_drained(self) -> None:
        concerned = self.scheduler.dissolving
        if not self.scheduler.drained or any(step.plan.group in concerned for step in self._in_flight):
            return
        drained, source = time.perf_counter(), self.layout
        self.scheduler.complete_switch()
        cutover = time.perf_counter() - drained
        self._report_switch(
            source, SwitchStrategy.SEQUENTIAL, drained - self._switch_started, cutover, MigrationTotals()
        )

    def _report_switch(
        self, source: Layout, strategy: SwitchStrategy, drain: float, cutover: float, totals: MigrationTotals
    ) -> None:
        self._counters["switches"] += 1
        report = SwitchReport(
            source=str(source),
            target=str(self.layout),
            strategy=strategy,
            drain_seconds=drain,
            cutover_seconds=cutover,
            requests_moved=totals.requests,
            kv_bytes_moved=totals.bytes_moved,
            kv_blocks_moved=totals.blocks_moved,
            tokens_recomputed=totals.tokens_recomputed,
            requests_waiting=len(self.scheduler.waiting),
        )
        self._last_switch = report
        logger.info(
            "switch %s -> %s (%s): drained in %.1f ms, cutover %.2f ms, %d requests and %d KV bytes moved",
            report.source, report.target, strategy, 1e3 * drain, 1e3 * cutover, totals.requests, totals.bytes_moved,
        )  # fmt: skip

    # -- observation ------------------------------------------------------------------------------------------

    def stats(self) -> EngineStats:
        scheduler, model = self.scheduler, self.model
        return EngineStats(
            layout=str(scheduler.layout),
            target_layout=None if scheduler.target is None else str(scheduler.target),
            running=scheduler.num_running,
            waiting=len(scheduler.waiting),
            kv_usage=self.kv.usage,
            free_blocks=tuple(allocator.num_free for allocator in self.kv.allocators),
            num_blocks=self.kv.spec.num_blocks,
            steps=self._counters["steps"],
            prompt_tokens=self._counters["prompt_tokens"],
            generation_tokens=self._counters["generation_tokens"],
            requests_finished=dict(self._finished),
            preemptions=scheduler.num_preemptions,
            switches=self._counters["switches"],
            last_switch=self._last_switch,
            executables=len(self.runner.executables),
            compile_seconds=self.runner.executables.compile_seconds,
            compiles_after_warmup=model.compiles.count - self._compiles_at_start,
            weight_bytes=self.runner.weights.resident_bytes,
            kv_bytes=self.runner.pool.nbytes,
        )
