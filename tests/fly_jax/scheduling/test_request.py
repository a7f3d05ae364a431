from __future__ import annotations

from tests.fly_jax.builders import make_request


def test_tokens_on_the_device_count_but_have_no_id_yet() -> None:
    request = make_request([5, 6, 7], max_tokens=4)
    request.output_ids = [8]
    request.num_pending, request.num_computed = 1, 4
    assert (request.num_known, request.num_tokens, request.num_uncomputed) == (4, 5, 1)
    assert [request.token_at(position) for position in range(5)] == [5, 6, 7, 8, -1]


def test_no_more_is_sampled_once_all_tokens_are_known_or_on_the_device() -> None:
    request = make_request(max_tokens=3)
    request.output_ids, request.num_pending = [1], 1
    assert not request.will_sample_no_more
    request.num_pending = 2
    assert request.will_sample_no_more
    request.output_ids, request.num_pending = [1, 2, 3], 0
    assert request.will_sample_no_more


def test_requests_with_equal_fields_are_different_requests() -> None:
    one, other = make_request(), make_request()
    assert one != other
    assert other not in [one]
