"""LLM and AsyncEngine hand switches and policies to the engine's thread, and ask it for the layout."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest

from fly_jax.async_engine import AsyncEngine
from fly_jax.errors import ConfigError, LayoutError
from fly_jax.llm import LLM
from fly_jax.outputs import SwitchReport, SwitchStrategy
from fly_jax.policy.adaptive import Decision, Policy, name_of, static
from fly_jax.policy.observation import Load, Machine


class FakeThread:
    """Stands for the engine's thread: one layout alone does not fit, one policy cannot be followed."""

    def __init__(self) -> None:
        self.layout = "1+1+1+1"
        self.calls: list[tuple[object, ...]] = []

    def switch(
        self, layout: str, strategy: SwitchStrategy | None = None, policy: str | None = None
    ) -> Future[SwitchReport]:
        self.calls.append((layout, strategy, policy))
        if layout == "3+1":
            return failed(LayoutError("layout 3+1 does not fit"))
        return done(SwitchReport(1, self.layout, layout, strategy or SwitchStrategy.MIGRATE))

    def set_policy(self, policy: str | Policy) -> Future[str]:
        self.calls.append((policy,))
        return failed(ConfigError("one layout only")) if policy == "auto" else done(name_of(policy))

    def stats(self) -> Future[Any]:
        return done(SimpleNamespace(layout=self.layout))


def done(value: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(value)
    return future


def failed(error: Exception) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_exception(error)
    return future


class Caller:
    """One of the two, awaited where it must be."""

    def __init__(self, kind: type[LLM] | type[AsyncEngine], thread: FakeThread) -> None:
        self.front = object.__new__(kind)  # without a model
        self.front._thread = thread  # type: ignore[assignment]

    def switch(self, *arguments: Any) -> SwitchReport:
        return self._call(self.front.switch, *arguments)

    def set_policy(self, policy: str | Policy) -> str:
        return self._call(self.front.set_policy, policy)

    def _call(self, method: Callable[..., Any], *arguments: Any) -> Any:
        if isinstance(self.front, LLM):
            return method(*arguments)

        async def wait() -> Any:
            return await method(*arguments)

        return asyncio.run(wait())


@pytest.fixture
def thread() -> FakeThread:
    return FakeThread()


@pytest.fixture(params=[LLM, AsyncEngine])
def caller(request: pytest.FixtureRequest, thread: FakeThread) -> Caller:
    return Caller(request.param, thread)


def test_a_switch_without_a_strategy_leaves_it_to_the_engine(caller: Caller, thread: FakeThread) -> None:
    assert caller.switch("2+2") == SwitchReport(1, "1+1+1+1", "2+2", SwitchStrategy.MIGRATE)
    assert thread.calls == [("2+2", None, None)]


@pytest.mark.parametrize("strategy", list(SwitchStrategy))
def test_a_strategy_is_given_by_its_name(caller: Caller, thread: FakeThread, strategy: SwitchStrategy) -> None:
    assert caller.switch("4", strategy.value).strategy is strategy
    assert thread.calls == [("4", strategy, None)]


def test_wrong_names_do_not_reach_the_engine(caller: Caller, thread: FakeThread) -> None:
    with pytest.raises(ConfigError, match=r"^strategy must be one of migrate, .*, got 'drain'$"):
        caller.switch("2+2", "drain")
    with pytest.raises(ConfigError, match=r"^policy must be one of auto, load_adaptive, static, got 'pin'$"):
        caller.set_policy("pin")
    with pytest.raises(ConfigError, match=r"^policy must be one of auto, load_adaptive, static, got 'pin'$"):
        caller.switch("2+2", None, "pin")
    assert thread.calls == []


def test_a_function_reaches_the_engine_as_it_is(caller: Caller, thread: FakeThread) -> None:
    def of_my_own(load: Load, machine: Machine) -> Decision:
        return static(load, machine)

    assert caller.set_policy(of_my_own) == "of_my_own"
    assert thread.calls == [(of_my_own,)]


def test_what_the_engine_refuses_is_raised(caller: Caller) -> None:
    with pytest.raises(LayoutError, match="3\\+1 does not fit"):
        caller.switch("3+1")
    with pytest.raises(ConfigError, match="one layout only"):
        caller.set_policy("auto")


def test_the_policy_that_takes_over_goes_with_the_switch(caller: Caller, thread: FakeThread) -> None:
    caller.switch("2+2", "migrate", "auto")
    assert thread.calls == [("2+2", SwitchStrategy.MIGRATE, "auto")]


def test_a_policy_is_handed_over(caller: Caller, thread: FakeThread) -> None:
    assert caller.set_policy("static") == "static"
    assert thread.calls == [("static",)]


def test_the_layout_is_the_engines_and_no_copy(caller: Caller, thread: FakeThread) -> None:
    assert caller.front.layout == "1+1+1+1"
    thread.layout = "4"  # the policy's doing
    assert caller.front.layout == "4"
