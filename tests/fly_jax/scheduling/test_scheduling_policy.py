"""Who may go before others: nobody by default, whoever says so with the scheduling policy ``priority``."""

from __future__ import annotations

from pathlib import Path

import pytest

from fly_jax.config import EngineConfig
from fly_jax.errors import InvalidRequestError
from fly_jax.sampling_params import SamplingParams
from tests.fly_jax.simulated_runner import simulated_engine
from tests.fly_jax.virtual_time import Arrival, Simulation


def test_requests_run_in_order_of_arrival_by_default() -> None:
    assert EngineConfig(Path("model")).scheduling_policy == "fcfs"


@pytest.mark.parametrize("priority", [-1, 1])
def test_a_priority_that_would_not_be_honoured_is_refused_and_leaves_nothing_behind(priority: int) -> None:
    engine, _ = simulated_engine(scheduling_policy="fcfs")
    with pytest.raises(
        InvalidRequestError, match=f"^priority {priority} needs --scheduling-policy priority"
    ) as refused:
        engine.add_request("a", [1], SamplingParams(priority=priority))
    assert refused.value.param == "priority"
    assert not engine.has_work
    engine.add_request("a", [1], SamplingParams(priority=0))
    assert engine.has_work


def test_a_flood_of_priorities_starves_the_others_only_where_the_server_runs_by_priority() -> None:
    """Steps until the first token of one ordinary request among 200 that want to go first."""
    flood = [Arrival(0.0, 100, 20, priority=-1) for _ in range(200)]

    def tokens_before(policy: str, priority: int) -> int:
        arrivals = [*flood[:60], Arrival(0.0, 100, 20), *flood[60:]]
        arrivals = [Arrival(each.at, 100, 20, each.priority and priority) for each in arrivals]
        simulation = Simulation(arrivals, policy="static", layout="4", max_num_seqs=4, scheduling_policy=policy)
        simulation.run()
        order = [delta.request_id for _, delta in simulation.deltas if delta.num_output_tokens == 1]
        return order.index("r60")

    assert tokens_before("fcfs", 0) == 60
    assert tokens_before("priority", -1) > 60
