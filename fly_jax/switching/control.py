"""When the layout changes and how: asks the policy, carries switches through, keeps their reports. No JAX."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import replace

from fly_jax.errors import ConfigError, LayoutError
from fly_jax.kv.slabs import KVMover
from fly_jax.layout import DeviceGroup, Layout
from fly_jax.outputs import SwitchReport, SwitchStrategy
from fly_jax.policy.adaptive import POLICIES, Decision, DecisionKind, Policy, name_of
from fly_jax.policy.arrival_rates import LoadEstimator
from fly_jax.policy.names import LOAD_ADAPTIVE, STATIC, canonical
from fly_jax.policy.observation import Load, Machine
from fly_jax.scheduling.request import Request
from fly_jax.scheduling.scheduler import Scheduler
from fly_jax.switching.log import SwitchLog
from fly_jax.switching.observe import load_of
from fly_jax.switching.strategies import LayoutSwitch
from fly_jax.switching.switch import Switch
from fly_jax.switching.switcher import Switcher
from fly_jax.switching.widening_limit import WideningLimit

logger = logging.getLogger(__name__)

# Passes of the step loop between two questions to the policy: a decision takes about as long as a tenth of a step.
PLAN_EVERY = 4
# A switch that the scheduler refused is not tried again for so many seconds.
RETRY_SECONDS = 1.0
# What takes over from a policy that fails: it serves every request, whatever width it needs.
FALLBACK = LOAD_ADAPTIVE
ASKED_FOR = "asked for"


class LayoutControl:
    """The layout's side of an engine.

    Args:
        mover: moves KV between groups.
        strategy: of switches that name none.
        clock: seconds, real or virtual.

    Attributes:
        policy: name of the policy in force.
        decisions: how often the policy decided to change something, and what.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        mover: KVMover,
        machine: Machine,
        *,
        policy: str,
        strategy: SwitchStrategy,
        clock: Callable[[], float],
    ) -> None:
        self.scheduler, self.machine, self.strategy = scheduler, machine, strategy
        self.switcher = Switcher(scheduler, mover)
        self.policy = canonical(policy)
        self._policies: dict[str, Policy] = dict(POLICIES)
        self.log = SwitchLog(clock)
        self.estimator = LoadEstimator()
        self.decisions: Counter[str] = Counter()
        self.last_decision: str | None = None
        self._clock = clock
        self._switch: Switch | None = None
        self._retry_at: dict[Layout, float] = {}
        self._widening_limit = WideningLimit()
        self._held_until: float | None = None

    @property
    def switching(self) -> bool:
        return self._switch is not None

    # -- what others ask for ----------------------------------------------------------------------------------

    def parse(self, text: str) -> Layout:
        """A layout that can be switched to.

        Raises:
            LayoutError: the text does not fit the devices, or programs for it were not compiled.
        """
        layout = Layout.parse(text, self.machine.num_devices, self.machine.base_tp)
        if missing := [str(group) for group in layout.groups if group not in self.machine.groups]:
            raise LayoutError(
                f"layout {layout} needs {', '.join(missing)}, which --layouts left out: start again with {layout} in it"
            )
        return layout

    def begin(self, target: Layout, strategy: SwitchStrategy | None = None) -> Switch:
        """Goes to another layout and keeps it: when it is there, the policy becomes static.

        Raises:
            LayoutError: a request does not fit the layout, or a switch is already under way.
        """
        switch = self._begin(target, strategy or self.strategy, ASKED_FOR, elastic=False)
        logger.info("switch %s -> %s (%s) asked for", switch.source, target, strategy or self.strategy)
        return switch

    def set_policy(self, policy: str | Policy) -> str:
        """Hands the layout to a policy, a built-in one by its name or a function; returns its canonical name.

        Raises:
            ConfigError: there is no such policy, or a function has the name of a built-in one.
            LayoutError: the layout cannot be kept, because a request needs a wider one; or a switch is under way.
        """
        given = name_of(policy)
        name = canonical(given)
        function = POLICIES.get(name) if isinstance(policy, str) else policy
        if function is None:
            raise ConfigError(f"there is no policy {policy!r}: choose one of {', '.join(POLICIES)}")
        if function is not POLICIES.get(name, function):
            raise ConfigError(f"policy {given!r} is built in: give the function another name")
        if self.switching:
            raise LayoutError(f"a switch to {self.switcher.target} is under way: ask again when it has ended")
        if name == STATIC and self.scheduler.elastic:
            self.switcher.check_pinned()
        self.scheduler.set_elastic(name != STATIC)
        self.policy, self._policies[name] = name, function
        logger.info("policy: %s asked for, at %s", name, self.scheduler.layout)
        return name

    # -- the step loop ----------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Plans a switch's next part; the steps of this pass are scheduled and about to be launched."""
        if self._switch is not None and self.switcher.switch is not None:
            self._hasten_if_late(self._switch, self.switcher.switch)
            self.switcher.prepare()

    def advance(self, launched: Collection[DeviceGroup], in_flight: Collection[DeviceGroup]) -> bool:
        """Carries a switch on, right behind the launches of a step; True if the layout has changed.

        A pass that launched nothing on the dissolving groups, while they compute, is left out: right behind a launch,
        the devices have work while the host prepares the first new step.
        """
        switch, way = self._switch, self.switcher.switch
        if switch is None or way is None:
            return False
        old_in_flight = not set(way.dissolving).isdisjoint(in_flight)
        if old_in_flight and set(way.dissolving).isdisjoint(launched):
            return False
        started = self._clock()
        try:
            done = self.switcher.advance()
        except LayoutError as error:
            self._refuse(switch, error)
            return False
        if done is None:
            return False
        self._switch = None
        if not done.elastic:
            self.policy = STATIC
        self.log.switched(switch, done, started, old_in_flight, len(self.scheduler.waiting))
        return True

    def settle(self) -> None:
        """Takes in what the last step showed, and logs switches that are through."""
        for totals in self.switcher.take_adopted():
            self.log.adopted(totals)
        for report in self.log.settle():
            _log_report(report)

    def plan(self) -> None:
        """Asks the policy, and begins the switch that it decides on."""
        if self.policy == STATIC or self.switching or self.scheduler.passes % PLAN_EVERY:
            return
        now = self._clock()
        load = load_of(self.scheduler, self.estimator.rates(now), now, self.log.last_switch)
        decision = self._ask(load)
        target = decision.target
        if target is None or target == self.scheduler.layout or now < self._retry_at.get(target, now):
            return
        for_requests = decision.kind is DecisionKind.MAKE_ROOM or _serves_more(load, target)
        if for_requests or self._may_split(decision, target, now):
            self._decide(decision, target, now, for_requests=for_requests)

    def _may_split(self, decision: Decision, target: Layout, now: float) -> bool:
        """False while groups that requests made come and go too often; says so once."""
        until = self._widening_limit.kept_until(target, now)
        if until is not None and until != self._held_until:
            self._held_until = until
            logger.info(
                "policy: %s stays for %.1f s, requests asked for its groups too often; then %s: %s, %s",
                self.scheduler.layout, until - now, target, decision.kind, decision.reason,
            )  # fmt: skip
        return until is None

    def _ask(self, load: Load) -> Decision:
        """What the policy wants; one that fails gives way, since the requests of everybody else depend on this loop."""
        try:
            decision = self._policies[self.policy](load, self.machine)
            if not isinstance(decision, Decision):
                raise TypeError(f"a policy returns a Decision, got {decision!r}")
            return decision if decision.target is None else replace(decision, target=self.parse(str(decision.target)))
        except Exception as error:
            if self.policy == FALLBACK:
                raise
            logger.exception("policy: %s failed, %s takes over", self.policy, FALLBACK)
            # Anybody may read this; the log has the rest.
            self.last_decision = f"{self.policy} failed ({type(error).__name__}): {FALLBACK} takes over"
            self.policy = FALLBACK
            return Decision(None, DecisionKind.HOLD, self.last_decision)

    def _decide(self, decision: Decision, target: Layout, now: float, *, for_requests: bool) -> None:
        source = self.scheduler.layout
        text = f"{source} -> {target}: {decision.kind}, {decision.reason}"
        try:
            self._begin(target, self._strategy_for(decision), decision.reason, elastic=True)
        except LayoutError as error:
            self._retry_at[target] = now + RETRY_SECONDS
            logger.info("policy: %s; refused: %s", text, error)
            self.decisions["refused"] += 1
            return
        if for_requests:
            self._widening_limit.widened(source, target, now)
        self.last_decision = text
        self.decisions[str(decision.kind)] += 1
        logger.info("policy: %s", text)

    def _strategy_for(self, decision: Decision) -> SwitchStrategy:
        """A request that is outgrowing its group cannot wait until it has ended there, nor be paused."""
        waits = self.strategy is not SwitchStrategy.MIGRATE
        if waits and decision.kind is DecisionKind.MAKE_ROOM and self._some_running_needs_more():
            logger.info("policy: %s gives way to migrate: a running request outgrows its group", self.strategy)
            return SwitchStrategy.MIGRATE
        return self.strategy

    def _some_running_needs_more(self) -> bool:
        groups = self.scheduler.groups.values()
        return any(
            len(request.prompt_ids) + request.max_tokens > group.capacity_tokens
            for group in groups
            for request in group.running
        )

    def _begin(self, target: Layout, strategy: SwitchStrategy, reason: str, *, elastic: bool) -> Switch:
        source = self.scheduler.layout
        self.switcher.begin(target, strategy, elastic=elastic)
        self._switch = self.log.begun(source, target, reason, self.scheduler.passes)
        return self._switch

    def _hasten_if_late(self, switch: Switch, way: LayoutSwitch) -> None:
        """Nobody waits for ever for devices that drain: beyond patience, a policy's switch migrates instead.

        A drain that would never end, and cannot become a migration, is given up.
        """
        late = way.elastic and self.scheduler.passes - switch.begun_at_pass > self.scheduler.limits.patience
        drains = way.strategy in (SwitchStrategy.SEQUENTIAL, SwitchStrategy.SOFT_PREEMPT)
        if not drains or not (late or way.stuck):
            return
        switch.begun_at_pass = self.scheduler.passes
        try:
            self.switcher.hasten()
        except LayoutError as error:
            logger.info("switch to %s: %s goes on, for it cannot migrate: %s", switch.target, way.strategy, error)
            if way.stuck:
                self._refuse(switch, error)
            return
        switch.hastened = self._clock()
        logger.info("switch to %s: %s gives way to migrate, for it took too long", switch.target, way.strategy)

    def _refuse(self, switch: Switch, error: LayoutError) -> None:
        self.switcher.cancel()
        self.log.given_up(switch)
        switch.error, switch.settled = error, True
        self._switch = None
        if switch.reason != ASKED_FOR:
            self.decisions["given_up"] += 1
        self._retry_at[switch.target] = self._clock() + RETRY_SECONDS
        logger.warning("switch %s -> %s given up: %s", switch.source, switch.target, error)

    # -- what requests do -------------------------------------------------------------------------------------

    def arrived(self, request: Request) -> None:
        self.estimator.arrived(self._clock(), len(request.prompt_ids), request.limit)

    def ended(self, request: Request) -> None:
        self.estimator.finished(len(request.output_ids))
        self.log.ended(request)


def _serves_more(load: Load, target: Layout) -> bool:
    """Some waiting request asks for more width than the layout has, and would get more."""
    wanted = max((request.min_width for request in load.waiting), default=1)
    return min(wanted, target.widest) > load.layout.widest


def _log_report(report: SwitchReport) -> None:
    moves_kv = report.strategy is SwitchStrategy.MIGRATE
    level = logging.WARNING if moves_kv and report.tokens_recomputed else logging.INFO
    logger.log(
        level,
        "switch %d, %s -> %s (%s, %s): drained %.1f ms, copied ahead %.1f ms, cutover %.2f ms, worst gap %.1f ms, "
        "%d requests moved, %d paused, %d adopted, %d KV bytes in %d blocks moved by %d launches, %d tokens recomputed",
        report.number, report.source, report.target, report.strategy, report.reason,
        1e3 * report.drain_seconds, 1e3 * report.precopy_seconds, 1e3 * report.cutover_seconds,
        1e3 * report.worst_gap_seconds, report.requests_moved, report.requests_paused, report.requests_adopted,
        report.kv_bytes_moved, report.kv_blocks_moved, report.relayout_launches,
        report.tokens_recomputed,
    )  # fmt: skip
