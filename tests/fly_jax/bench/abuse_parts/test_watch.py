"""What probes make of times: silences count as far as they were seen."""

from __future__ import annotations

from dataclasses import dataclass

from fly_jax.bench.abuse_parts.watch import CallWatch, StreamWatch, streams_seen


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_stream_s_gaps_are_between_its_pieces_and_its_start_is_apart() -> None:
    clock = Clock()
    watch = StreamWatch(clock)
    watch.sent()
    for clock.now in (2.0, 2.1, 2.5):
        watch.pieces(1)
    watch.ended()
    clock.now = 9.0
    watch.stop()
    seen = streams_seen([watch])
    assert (seen.tokens, seen.longest_start_ms, seen.longest_gap_ms) == (3, 2000, 400)


def test_pieces_that_come_together_have_no_gap_between_them() -> None:
    clock = Clock()
    watch = StreamWatch(clock)
    watch.sent()
    watch.pieces(1)
    clock.now = 0.2
    watch.pieces(4)
    seen = streams_seen([watch])
    assert (seen.tokens, seen.longest_gap_ms, seen.median_gap_ms) == (5, 200, 0)


def test_a_stream_that_is_silent_at_the_end_counts_up_to_there() -> None:
    clock = Clock()
    started, waiting = StreamWatch(clock), StreamWatch(clock)
    started.sent()
    started.pieces(1)
    waiting.sent()
    clock.now = 3.0
    for each in (started, waiting):
        each.stop()
    seen = streams_seen([started, waiting])
    assert (seen.longest_gap_ms, seen.longest_start_ms) == (3000, 3000)


def test_a_stream_that_breaks_off_counts_its_last_silence_and_one_that_is_refused_none() -> None:
    clock = Clock()
    broken, refused = StreamWatch(clock), StreamWatch(clock)
    broken.sent()
    broken.pieces(1)
    refused.sent()
    clock.now = 1.5
    broken.ended("broken stream")
    refused.ended("503")
    clock.now = 60.0
    for each in (broken, refused):
        each.stop()
    seen = streams_seen([broken, refused])
    assert seen.failures == {"broken stream": 1, "503": 1}
    assert (seen.longest_gap_ms, seen.longest_start_ms) == (1500, 0)


def test_what_was_before_the_phase_is_forgotten() -> None:
    clock = Clock()
    stream, calls = StreamWatch(clock), CallWatch(clock)
    stream.sent()
    stream.pieces(1)
    calls.asked()
    calls.answered("503")
    calls.asked()
    clock.now = 10.0
    stream.begin()
    calls.begin()
    clock.now = 10.5
    stream.pieces(1)
    calls.answered()
    assert streams_seen([stream]).longest_gap_ms == 500
    assert (calls.seen().answers, calls.seen().longest_ms, calls.seen().failures) == (1, 500, {})


def test_failures_and_calls_without_an_answer_lengthen_the_gap_of_good_answers() -> None:
    clock = Clock()
    watch = CallWatch(clock)
    watch.begin()
    for clock.now, failure in ((1.0, ""), (2.0, "503"), (4.0, "")):
        watch.asked()
        watch.answered(failure)
    watch.asked()
    clock.now = 11.0
    watch.stop()
    seen = watch.seen()
    assert (seen.answers, seen.longest_ms, seen.longest_gap_ms, seen.failures) == (2, 7000, 7000, {"503": 1})
