"""Which requests are taken, which start, and what each group computes next. Pure Python, no JAX.

The engine, the tests and simulations run this same object; it never looks at a clock.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection

from fly_jax.errors import ClientQueueFullError, ContextLengthError, InvalidRequestError, QueueFullError
from fly_jax.kv.blocks import KVCacheManager
from fly_jax.layout import DeviceGroup, Layout
from fly_jax.outputs import FinishReason
from fly_jax.scheduling.admission import Admission
from fly_jax.scheduling.group import release
from fly_jax.scheduling.request import Request, RequestState
from fly_jax.scheduling.state import SchedulingState
from fly_jax.scheduling.step import SchedulerLimits, StepPlan


class Scheduler(SchedulingState):
    """The scheduling state of an engine, and what is decided about it on every pass.

    Args:
        max_model_len: context limit in tokens, whatever the layout.
        max_queued: most requests waiting.
        max_queued_per_client: most requests of one client waiting; None: as many as of all.
        compiled, elastic: see :class:`SchedulingState`.
    """

    def __init__(
        self,
        layout: Layout,
        limits: SchedulerLimits,
        kv: KVCacheManager,
        *,
        max_model_len: int,
        max_queued: int,
        max_queued_per_client: int | None = None,
        compiled: Collection[DeviceGroup],
        elastic: bool = False,
    ) -> None:
        super().__init__(layout, limits, kv, compiled=compiled, elastic=elastic)
        self.max_model_len, self.max_queued = max_model_len, max_queued
        self.max_queued_per_client = max_queued if max_queued_per_client is None else max_queued_per_client
        self._admission = Admission(self)
        self._order = itertools.count()

    # -- requests ---------------------------------------------------------------------------------------------

    def context_limit(self) -> int:
        """Most tokens one request may hold, prompt and output: the model's limit or the widest group's pool."""
        return min(self.max_model_len, self.kv.spec.capacity_tokens(self.width_limit()))

    def width_limit(self) -> int:
        """The largest TP degree that a request can get."""
        layout, elastic = self.hooks.destination or (self.layout, self.elastic)
        return self.widest if elastic else layout.widest

    def check(self, prompt_tokens: int, min_width: int = 1, *, bounded: bool = True, client: str | None = None) -> None:
        """Refuses a request that could never run, or one too many, in all or of its client.

        Raises:
            ContextLengthError, InvalidRequestError, QueueFullError, ClientQueueFullError: with both numbers.
        """
        limit = self.context_limit()
        if prompt_tokens >= limit:
            could_be = min(self.max_model_len, self.kv.spec.capacity_tokens(self.widest))
            hint = f" or switch to a wider layout (up to {could_be})" if could_be > limit else ""
            raise ContextLengthError.of_prompt(limit, str(prompt_tokens), hint=hint)
        if min_width > self.width_limit():
            raise InvalidRequestError(
                f"tensor_parallel_size {min_width} is wider than the {self.width_limit()} devices a group may have: "
                f"ask for less" + (" or switch to a wider layout" if min_width <= self.widest else ""),
                param="tensor_parallel_size",
            )
        if bounded and client is not None and self.waiting.count_of(client) >= self.max_queued_per_client:
            raise ClientQueueFullError(
                f"{self.waiting.count_of(client)} of your requests are waiting and at most "
                f"{self.max_queued_per_client} of one client may: try later"
            )
        if bounded and len(self.waiting) >= self.max_queued:
            raise QueueFullError(
                f"{len(self.waiting)} requests are waiting and at most {self.max_queued} may: try later"
            )

    def add(self, request: Request) -> None:
        """Queues a request that :meth:`check` has let through."""
        request.order = next(self._order)
        self.requests[request.request_id] = request
        self.waiting.add(request)

    def finish(self, request: Request, reason: FinishReason) -> None:
        """Ends a request in any state and frees all that it holds."""
        if request.state is RequestState.RUNNING:
            self.group_of(request).remove(request)
        elif request.state is RequestState.WAITING:
            self.waiting.remove(request)
        else:
            self.paused.remove(request)
            release(request, self.kv, self.slots)
        request.state = RequestState.FINISHED
        request.finish_reason = reason
        del self.requests[request.request_id]
        self.hooks.forget(request)

    # -- steps ------------------------------------------------------------------------------------------------

    def route(self) -> None:
        """Starts waiting requests, each in its turn, and paused ones whose groups' successors are idle.

        Paused ones that have waited too long go first: until they have their places, nobody else starts there.
        """
        self.passes += 1
        self._admission.start_waiting(self.hooks.resume_overdue())
        self.hooks.resume_idle()

    def schedule(self, group: DeviceGroup) -> StepPlan | None:
        """The group's next step, or None."""
        return self.groups[group].schedule(self.preempt, self.hooks.reclaim)

    @property
    def has_work(self) -> bool:
        return bool(self.requests) or self.hooks.destination is not None
