"""One client holds at most its share of the waiting places, and only for as long as its requests wait."""

from __future__ import annotations

import random

import pytest

from fly_jax.engine.engine import Engine
from fly_jax.errors import ClientQueueFullError, InvalidRequestError, QueueFullError
from fly_jax.sampling_params import SamplingParams
from tests.fly_jax.builders import make_request
from tests.fly_jax.schedulers import add, make_scheduler
from tests.fly_jax.simulated_runner import simulated_engine

FLOODER, OTHER = "192.0.2.1", "192.0.2.2"
PARAMS = SamplingParams(max_tokens=8, ignore_eos=True)


def accepts(engine: Engine, name: str, client: str | None) -> bool:
    try:
        engine.add_request(name, [1, 2, 3], PARAMS, client=client)
    except ClientQueueFullError:
        return False
    return True


def drain(engine: Engine) -> None:
    while engine.has_work:
        engine.step()


def test_beyond_its_share_a_client_is_refused_with_both_numbers_and_others_are_not() -> None:
    scheduler = make_scheduler("4", max_queued=4, max_queued_per_client=2)
    add(scheduler, *(make_request(name=name, client=FLOODER) for name in "ab"))
    with pytest.raises(ClientQueueFullError, match="2 of your requests are waiting and at most 2 of one client may"):
        scheduler.check(1, client=FLOODER)
    add(scheduler, make_request(name="c", client=OTHER), make_request(name="d"))
    with pytest.raises(QueueFullError, match="4 requests are waiting and at most 4 may"):
        scheduler.check(1)


def test_offline_batches_have_no_share() -> None:
    scheduler = make_scheduler("4", max_queued_per_client=1)
    add(scheduler, make_request(name="a", client=FLOODER))
    scheduler.check(1, bounded=False, client=FLOODER)


def test_requests_that_run_leave_their_waiting_places_and_take_them_again_when_preempted() -> None:
    scheduler = make_scheduler("4", max_queued_per_client=1)
    request = make_request(name="a", client=FLOODER)
    add(scheduler, request)
    scheduler.route()
    assert scheduler.waiting.count_of(FLOODER) == 0
    scheduler.check(1, client=FLOODER)
    scheduler.preempt(request)
    assert scheduler.waiting.count_of(FLOODER) == 1
    with pytest.raises(ClientQueueFullError):
        scheduler.check(1, client=FLOODER)


def test_whoever_leaves_while_it_waits_frees_its_place() -> None:
    engine, _ = simulated_engine(layout="4", max_num_seqs=1, queued_per_client=2)
    assert [accepts(engine, name, FLOODER) for name in "abc"] == [True, True, False]
    engine.abort("b")
    assert engine.scheduler.waiting.count_of(FLOODER) == 1
    assert accepts(engine, "d", FLOODER)
    drain(engine)


@pytest.mark.parametrize("seed", range(3))
def test_under_a_flood_the_others_are_served_and_nothing_is_left(seed: int) -> None:
    chance = random.Random(seed)
    engine, _ = simulated_engine(max_num_seqs=1, max_queued=8, queued_per_client=4)
    refused = 0
    for number in range(60):
        for index in range(6):
            refused += not accepts(engine, f"flood-{number}-{index}", FLOODER)
        assert accepts(engine, f"other-{number}", OTHER)
        waiting = [request.client for request in engine.scheduler.waiting]
        assert {client: waiting.count(client) for client in (FLOODER, OTHER)} == {
            client: engine.scheduler.waiting.count_of(client) for client in (FLOODER, OTHER)
        }
        if chance.random() < 0.3:
            engine.abort(chance.choice(list(engine.scheduler.requests)))
        while engine.scheduler.waiting.count_of(OTHER):
            engine.step()
    assert refused > 100
    drain(engine)
    assert engine.scheduler.waiting.count_of(FLOODER) == engine.scheduler.waiting.count_of(OTHER) == 0


def test_no_width_may_be_asked_for_where_the_operator_says_so() -> None:
    engine, _ = simulated_engine(policy="load_adaptive", allow_request_width=False)
    with pytest.raises(
        InvalidRequestError, match=r"tensor_parallel_size 4 is refused.*--no-allow-request-width"
    ) as error:
        engine.add_request("a", [1, 2, 3], SamplingParams(tensor_parallel_size=4))
    assert error.value.param == "tensor_parallel_size"
    assert not engine.has_work
    engine.add_request("b", [1, 2, 3], SamplingParams(max_tokens=2, tensor_parallel_size=1))
    drain(engine)
    assert engine.stats().switches == {}
