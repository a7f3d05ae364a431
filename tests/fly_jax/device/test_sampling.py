from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fly_jax.device import sampling
from fly_jax.device.sampling import SamplingRows, results
from fly_jax.device.step_upload import pack_sampling, sampling_layout
from fly_jax.sampling_params import MAX_LOGPROBS
from fly_jax.scheduling.results import RESULT_COLUMNS
from fly_jax.scheduling.step import ScheduledRow
from tests.fly_jax.builders import make_request

VOCABULARY = 32
ROWS = 8
rng = np.random.default_rng(0)
LOGITS = rng.normal(size=(ROWS, VOCABULARY)).astype(np.float32) * 2


@cache
def compiled() -> Any:
    return jax.jit(
        lambda logits, packed: sampling.sample(logits, SamplingRows.of(sampling_layout(ROWS).unpack(packed)))
    )


def make_row(draw: int = 0, **params: Any) -> ScheduledRow:
    """A row that samples output token number ``draw``."""
    request = make_request(1, **{"seed": 0, **params})
    return ScheduledRow(request, start=draw, count=1, samples=True, scores=False, slot=0)


def sample(logits: np.ndarray, rows: Sequence[ScheduledRow]) -> np.ndarray:
    """Up to ROWS rows through the upload and the program that an engine's head runs."""
    padded = np.zeros((ROWS, VOCABULARY), np.float32)
    padded[: len(rows)] = logits
    packed = pack_sampling(tuple(rows), ROWS, pad_slot=0)[0]
    return np.asarray(compiled()(padded, packed))[: len(rows)]


def draws(logits: np.ndarray, count: int, seed: int = 0, **params: Any) -> np.ndarray:
    """The first tokens of a request that sees these logits again and again."""
    same = np.tile(logits, (ROWS, 1))
    tokens = [
        sample(same, [make_row(first + i, seed=seed, **params) for i in range(ROWS)]) for first in range(0, count, ROWS)
    ]
    return np.concatenate(tokens)[:count]


def distribution(
    logits: np.ndarray, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> np.ndarray:
    """Temperature, then top-k, then top-p of what is left, and min-p: token by token, in float64."""
    scaled = logits.astype(np.float64) / temperature
    order = np.argsort(-scaled, kind="stable")
    kept = order[: top_k or len(order)]
    mass = np.exp(scaled[kept] - scaled[kept].max())
    mass /= mass.sum()
    chosen: list[int] = []
    reached = 0.0
    for token, probability in zip(kept, mass, strict=True):
        if chosen and reached >= top_p:
            break
        reached += probability
        if not chosen or probability >= min_p * mass[0]:
            chosen.append(token)
    result = np.zeros(len(logits))
    result[chosen] = np.exp(scaled[chosen] - scaled[chosen].max())
    return result / result.sum()


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "cold": {"temperature": 0.5},
    "hot": {"temperature": 2.5},
    "top_k": {"top_k": 3},
    "top_k of one": {"top_k": 1},
    "top_k beyond the vocabulary": {"top_k": 1000},
    "top_p": {"top_p": 0.6},
    "top_p of almost nothing": {"top_p": 1e-6},
    "min_p": {"min_p": 0.2},
    "min_p of one": {"min_p": 1.0},
    "top_k then top_p": {"top_k": 6, "top_p": 0.7},
    "all": {"temperature": 1.7, "top_k": 12, "top_p": 0.8, "min_p": 0.15},
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_tokens_are_drawn_from_the_distribution_that_the_options_leave(case: str) -> None:
    count, logits = 2000, LOGITS[0]
    expected = distribution(logits, **CASES[case])
    counts = np.bincount(draws(logits, count, seed=1, **CASES[case]), minlength=VOCABULARY)
    assert not counts[expected == 0].any()
    # Five standard deviations of a binomial count, and a count that a rare token may have by chance.
    bound = 5 * np.sqrt(count * expected * (1 - expected)) + 2
    assert np.all(np.abs(counts - count * expected) <= bound)
    assert np.all(counts[count * expected > 30] > 0)


def test_the_cases_keep_different_tokens() -> None:
    kept = {case: int((distribution(LOGITS[0], **options) > 0).sum()) for case, options in CASES.items()}
    assert kept["top_k"] == 3
    assert kept["top_k of one"] == kept["top_p of almost nothing"] == kept["min_p of one"] == 1
    assert kept["plain"] == kept["top_k beyond the vocabulary"] == VOCABULARY
    assert 1 < kept["top_k then top_p"] < 6
    assert len({kept[case] for case in ("top_k", "top_p", "min_p", "all", "plain")}) >= 4


def test_top_p_is_taken_of_what_top_k_left() -> None:
    logits = np.log(np.array([0.4, 0.3, 0.2, 0.1] + [1e-9] * (VOCABULARY - 4), np.float32))
    alone, after_top_k = draws(logits, 400, top_p=0.55), draws(logits, 400, top_k=2, top_p=0.55)
    assert set(alone) == {0, 1}  # 0.4 is short of 0.55
    assert set(after_top_k) == {0}  # 0.4 of 0.7 is not


@pytest.mark.parametrize("temperature", [0.0, 1e-6])
def test_a_vanishing_temperature_is_greedy_whatever_else_is_asked(temperature: float) -> None:
    rows = [make_row(temperature=temperature, top_k=5, top_p=0.5, min_p=0.1, seed=row) for row in range(ROWS)]
    np.testing.assert_array_equal(sample(LOGITS, rows), LOGITS.argmax(axis=-1))


def test_greedy_rows_are_greedy_beside_rows_that_sample() -> None:
    rows = [make_row(temperature=float(row % 2), top_k=row) for row in range(ROWS)]
    tokens = sample(LOGITS, rows)
    np.testing.assert_array_equal(tokens[::2], LOGITS.argmax(axis=-1)[::2])


@pytest.mark.parametrize("case", CASES)
def test_a_seed_gives_the_same_token_at_any_place_in_any_batch(case: str) -> None:
    alone = [sample(LOGITS[:1], [make_row(draw, seed=9, **CASES[case])])[0] for draw in range(12)]
    others: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"top_k": 2},
        {"top_p": 0.3},
        {"min_p": 0.5},
        {},
        {"temperature": 3.0},
        {"seed": 9},
    ]
    for draw, expected in enumerate(alone):
        place = draw % ROWS
        rows = [make_row(50 + i, **{"seed": 100 + i, **options}) for i, options in enumerate(others)]
        rows.insert(place, make_row(draw, seed=9, **CASES[case]))
        logits = np.roll(LOGITS, place, axis=0)
        logits[place] = LOGITS[0]
        assert sample(logits, rows)[place] == expected


def test_a_row_that_truncates_nothing_keeps_its_tail_beside_one_that_does() -> None:
    """Probabilities summed in float32 reach 1 before the last token; the tail must stay possible all the same."""
    logits = np.random.default_rng(0).normal(size=(16, 512)).astype(np.float32) * 6
    packed = pack_sampling((*(make_row() for _ in range(15)), make_row(top_k=5)), 16, pad_slot=0)[0]
    rows = SamplingRows.of(sampling_layout(16).unpack(jnp.asarray(packed)))
    kept = np.asarray(jax.jit(lambda logits: sampling.what_is_kept(logits, rows).holds(logits))(logits))
    assert kept[:15].all()
    np.testing.assert_array_equal(np.flatnonzero(kept[15]), np.sort(np.argsort(-logits[15])[:5]))


@pytest.mark.parametrize(("one", "other"), [(0, 1), (7, 7 + 2**32), (2**32, 2**33), (0, 2**63 - 1)])
def test_seeds_that_differ_in_any_bit_give_different_tokens(one: int, other: int) -> None:
    flat = np.zeros(VOCABULARY, np.float32)
    assert draws(flat, 24, seed=one).tolist() == draws(flat, 24, seed=one).tolist()
    assert draws(flat, 24, seed=one).tolist() != draws(flat, 24, seed=other).tolist()


def test_successive_tokens_of_a_request_are_independent_draws() -> None:
    flat = np.zeros(VOCABULARY, np.float32)
    tokens = draws(flat, 2000, seed=3)
    pairs = np.bincount(tokens[:-1] % 4 * 4 + tokens[1:] % 4, minlength=16)
    assert np.all(np.abs(pairs - 2000 / 16) < 5 * np.sqrt(2000 / 16))


def test_masked_tokens_are_never_drawn() -> None:
    logits = np.where(np.arange(VOCABULARY) % 2 == 0, 0.0, -np.inf).astype(np.float32)
    assert set(draws(logits, 400) % 2) == {0}
    assert set(draws(logits, 400, top_k=30) % 2) == {0}


# Tokens 5, 9 and 20 are exactly as likely, and the likeliest; 3 and 7 come next.
TIED = np.full(VOCABULARY, -3.0, np.float32)
TIED[[5, 9, 20]], TIED[[3, 7]] = 2.0, 1.0


@pytest.mark.parametrize(
    "options",
    [{"temperature": 0.0}, {"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}, {"top_k": 1, "temperature": 3.0}],
    ids=str,
)
def test_whatever_leaves_one_token_leaves_the_lowest_id_of_equal_logits(options: dict[str, Any]) -> None:
    assert set(draws(TIED, 40, **options)) == {5}


@pytest.mark.parametrize(
    ("options", "kept"),
    [({"top_k": 2}, {5, 9}), ({"top_k": 4}, {3, 5, 9, 20}), ({"top_p": 0.35}, {5, 9}), ({"min_p": 0.9}, {5, 9, 20})],
    ids=str,
)
def test_of_equal_logits_at_the_border_those_of_lowest_id_are_kept(options: dict[str, Any], kept: set[int]) -> None:
    assert set(draws(TIED, 200, **options)) == kept


def test_logits_that_become_equal_only_by_their_temperature_keep_their_order() -> None:
    """Two neighbours below 2 are the same float32 after a division; top_k 1 must still pick what temperature 0 does."""
    temperature, logits = 1.29, np.full(VOCABULARY, -9.0, np.float32)
    logits[8] = np.nextafter(np.float32(2), np.float32(0))
    logits[4] = np.nextafter(logits[8], np.float32(0))
    assert logits[4] / np.float32(temperature) == logits[8] / np.float32(temperature)
    assert set(draws(logits, 16, top_k=1, temperature=temperature)) == {8}


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"temperature": 1.0}, {"top_k": 2}], ids=str)
def test_masked_end_tokens_come_only_after_min_tokens(options: dict[str, Any]) -> None:
    """Rows of one batch, each at another output token; the mask depends on its number alone."""
    logits = np.full(VOCABULARY, -20.0, np.float32)
    logits[[2, 6, 11, 12]] = 30.0, 20.0, 0.0, -1.0
    rows = []
    for draw in range(ROWS):
        row = make_row(draw, min_tokens=5, **options)
        row.request.end_tokens = (2, 6)
        rows.append(row)
    tokens = sample(np.tile(logits, (ROWS, 1)), rows).tolist()
    assert set(tokens[:5]) <= {11, 12}
    assert options.get("temperature") != 0.0 or tokens[:5] == [11] * 5
    assert tokens[5:] == [2] * (ROWS - 5)


def test_a_mask_leaves_the_draws_of_what_remains_as_they_were() -> None:
    unlikely = LOGITS[:1].copy()
    unlikely[0, 7] = -np.inf
    for draw in range(12):
        masked = make_row(draw, min_tokens=16, max_tokens=16)
        masked.request.end_tokens = (7,)
        assert sample(LOGITS[:1], [masked]) == sample(unlikely, [make_row(draw)])


def test_scores_of_prompt_tokens_are_those_of_a_plain_log_softmax() -> None:
    """Rank as in vLLM: how many tokens are at least as likely, the token itself included."""
    targets = np.array([0, 5, 31, 7, 8, 9, 10, int(LOGITS[7].argmax())], np.int32)
    own, others = map(np.asarray, jax.jit(sampling.scores)(LOGITS, targets, np.full(ROWS, 4, np.int32)))
    exact = LOGITS.astype(np.float64)
    exact -= np.log(np.exp(exact).sum(axis=-1, keepdims=True))
    chosen = exact[np.arange(ROWS), targets]
    np.testing.assert_allclose(own.view(np.float32)[:, 0], chosen, atol=1e-5)
    np.testing.assert_array_equal(own[:, 1], (exact >= chosen[:, None]).sum(axis=-1))
    assert own[7, 1] == 1
    order = np.argsort(-exact, axis=-1)[:, :MAX_LOGPROBS]
    np.testing.assert_array_equal(others[:, :MAX_LOGPROBS], order)
    values = others.view(np.float32)[:, MAX_LOGPROBS:]
    np.testing.assert_allclose(values, np.take_along_axis(exact, order, axis=-1), atol=1e-5)
    assert values[7, 0] == own.view(np.float32)[7, 0]  # bit for bit: lm_eval compares them


@cache
def compiled_results() -> Any:
    return jax.jit(results)


class TestResults:
    def test_log_probabilities_are_those_of_the_untempered_distribution(self) -> None:
        tokens = np.arange(ROWS, dtype=np.int32)
        bits = np.asarray(compiled_results()(LOGITS, tokens, np.zeros(ROWS, np.int32)))
        np.testing.assert_array_equal(bits[:, 0], tokens)
        exact = LOGITS.astype(np.float64)
        exact -= np.log(np.exp(exact).sum(axis=-1, keepdims=True))
        np.testing.assert_allclose(bits.view(np.float32)[:, 1], exact[np.arange(ROWS), tokens], atol=1e-5)
        assert not bits[:, 2:].any()

    def test_alternatives_are_the_most_likely_tokens_in_order(self) -> None:
        wanted = np.array([0] * (ROWS - 1) + [3], np.int32)
        bits = np.asarray(compiled_results()(LOGITS, np.zeros(ROWS, np.int32), wanted))
        order = np.argsort(-LOGITS, axis=-1)[:, :MAX_LOGPROBS]
        np.testing.assert_array_equal(bits[:, 2 : 2 + MAX_LOGPROBS], order)
        values = bits.view(np.float32)[:, 2 + MAX_LOGPROBS :]
        exact = np.take_along_axis(np.asarray(jax.nn.log_softmax(LOGITS)), order, axis=-1)
        np.testing.assert_allclose(values, exact, atol=1e-5)

    def test_a_row_is_nan_only_where_its_logits_are_no_distribution(self) -> None:
        """One -inf is a token that cannot be; NaN, +inf and nothing but -inf are failures, of their row alone."""
        logits = LOGITS.copy()
        logits[0, 3], logits[1, 3], logits[2, 3], logits[3] = -np.inf, np.nan, np.inf, -np.inf
        tokens = np.array([5, 5, 5, 5, 5, 5, 5, 3], np.int32)
        bits = np.asarray(compiled_results()(logits, tokens, np.zeros(ROWS, np.int32)))
        failed = np.isnan(bits.view(np.float32)[:, 1])
        np.testing.assert_array_equal(failed, [False, True, True, True, False, False, False, False])
        of_the_masked = np.asarray(compiled_results()(logits, np.full(ROWS, 3, np.int32), np.zeros(ROWS, np.int32)))
        assert of_the_masked.view(np.float32)[0, 1] == -np.inf

    def test_a_vocabulary_smaller_than_the_alternatives_is_padded(self) -> None:
        logits = jnp.zeros((2, MAX_LOGPROBS - 5))
        bits = np.asarray(compiled_results()(logits, jnp.zeros(2, jnp.int32), jnp.ones(2, jnp.int32)))
        assert bits.shape == (2, RESULT_COLUMNS)
        assert not bits[:, 2 + MAX_LOGPROBS - 5 : 2 + MAX_LOGPROBS].any()
