"""Random prompts."""

from __future__ import annotations

import pytest

from fly_jax.bench.prompts import RandomPrompts


def test_ids_are_spread_over_the_vocabulary_without_its_first_ten() -> None:
    ids = RandomPrompts(seed=0, vocab_size=30).prompt(0, 2000)
    assert len(ids) == 2000
    assert set(ids) == set(range(10, 30))


def test_a_prompt_is_its_seed_and_number_and_its_length_only_where_it_ends() -> None:
    prompts, again, other = RandomPrompts(5, 1000), RandomPrompts(5, 1000), RandomPrompts(6, 1000)
    prompts.prompt(1, 7)
    assert prompts.prompt(2, 40) == again.prompt(2, 40)
    assert again.prompt(2, 25) == again.prompt(2, 40)[:25]
    assert len({again.prompt(2, 40), again.prompt(3, 40), other.prompt(2, 40)}) == 3


def test_the_same_hash_id_is_the_same_512_tokens_and_others_differ() -> None:
    prompts = RandomPrompts(0, 1000)
    first = prompts.of_blocks((0, 7, 3), 1200, 1.0)
    second = prompts.of_blocks((0, 7, 4, 3), 2048, 1.0)
    assert (len(first), len(second)) == (1200, 2048)
    assert first[:1024] == second[:1024]
    assert first[1024:] != second[1024:1200]
    assert first[1024:] == second[1536 : 1536 + 176]
    blocks = [second[start : start + 512] for start in range(0, 2048, 512)]
    assert len(set(blocks)) == 4
    assert prompts.prompt(7, 512) not in blocks


@pytest.mark.parametrize("scale", [0.001, 0.0123, 0.1, 1 / 3, 0.5, 0.999, 1.7])
def test_scaled_prompts_have_every_token_and_share_what_their_blocks_share(scale: float) -> None:
    prompts = RandomPrompts(0, 100_000)
    shared = tuple(range(30))
    whole = round(30 * 512 * scale)
    left = prompts.of_blocks((*shared, 100), whole + 1, scale)
    right = prompts.of_blocks((*shared, 200), whole + 1, scale)
    assert (len(left), len(right)) == (whole + 1, whole + 1)
    assert left[:whole] == right[:whole]
    assert left[whole:] != right[whole:]


def test_a_prompt_that_is_cut_keeps_its_beginning() -> None:
    prompts = RandomPrompts(0, 1000)
    assert prompts.of_blocks((1, 2, 3), 600, 1.0) == prompts.of_blocks((1, 2, 3), 1500, 1.0)[:600]


def test_a_prompt_that_scales_to_nothing_still_has_its_token() -> None:
    assert len(RandomPrompts(0, 1000).of_blocks((1,), 1, 0.0001)) == 1
