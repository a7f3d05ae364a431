"""What an engine counts, and its answer to who asks."""

from __future__ import annotations

from collections import Counter

from fly_jax.outputs import EngineStats
from fly_jax.scheduling.runner import Runner
from fly_jax.scheduling.scheduler import Scheduler
from fly_jax.switching.control import LayoutControl


class Statistics:
    """
    Attributes:
        counts: by name, of what the scheduler and the layout's side do not count themselves.
        finished: requests by the reason that they ended for.
        info: what does not change; taken once, as counting hundreds of buffers takes longer than all else here.
    """

    def __init__(self, scheduler: Scheduler, control: LayoutControl, runner: Runner) -> None:
        self.counts: Counter[str] = Counter()
        self.finished: Counter[str] = Counter()
        self.info = runner.info
        self._scheduler, self._control, self._runner = scheduler, control, runner
        self._compiles_at_start = runner.compiles

    def now(self) -> EngineStats:
        scheduler, control, counts, kv = self._scheduler, self._control, self.counts, self._scheduler.kv
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
            kv_usage=kv.usage,
            free_blocks=tuple(allocator.num_free for allocator in kv.allocators),
            num_blocks=kv.spec.num_blocks,
            steps=counts["steps"],
            prompt_tokens=counts["prompt_tokens"],
            generation_tokens=counts["generation_tokens"],
            requests_finished=dict(self.finished),
            corrupted_requests=counts["corrupted_requests"],
            preemptions=scheduler.num_preemptions,
            switches={str(strategy): count for strategy, count in control.log.count.items()},
            switch_history=tuple(control.log.history),
            switch_tokens_recomputed=control.log.tokens_recomputed,
            switch_kv_bytes_moved=control.log.kv_bytes_moved,
            executables=self.info.programs,
            compile_seconds=self.info.compile_seconds,
            compiles_after_warmup=self._runner.compiles - self._compiles_at_start,
            weight_bytes=self.info.weight_bytes,
            kv_bytes=self.info.kv_bytes,
        )
