"""Prompts of random token ids."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fly_jax.bench.plan_limits import FIRST_RANDOM_ID
from fly_jax.bench.random_streams import Stream, generator

# Mooncake's traces name each 512 tokens of a prompt by a hash.
BLOCK_TOKENS = 512


class RandomPrompts:
    """Token ids drawn uniformly from ``[FIRST_RANDOM_ID, vocab_size)``, the same for the same seed and number."""

    def __init__(self, seed: int, vocab_size: int) -> None:
        self._seed = seed
        # Prompts refer to one object for each id: 8 bytes a token, where a new int each would take 40.
        self._ids = tuple(range(FIRST_RANDOM_ID, vocab_size))
        self._blocks: dict[int, tuple[int, ...]] = {}

    def prompt(self, number: int, tokens: int) -> tuple[int, ...]:
        """The prompt of request ``number``; of two lengths, the shorter begins the longer."""
        return self._draw(Stream.PROMPT, number, tokens)

    def of_blocks(self, hash_ids: Sequence[int], tokens: int, scale: float) -> tuple[int, ...]:
        """A prompt whose blocks of ``BLOCK_TOKENS * scale`` tokens are the same wherever the hash id is.

        Block ``i`` begins at token ``round(i * BLOCK_TOKENS * scale)``, so prompts that begin with the same hash ids
        begin with the same tokens, at every scale. A block that the end cuts is the beginning of the whole one.

        Args:
            hash_ids: as many as cover the tokens.
            tokens: of the prompt, scaled already.
        """
        ends = [round(number * BLOCK_TOKENS * scale) for number in range(1, len(hash_ids))] + [tokens]
        # Rounding can make a block a token longer than its share.
        longest = math.ceil(BLOCK_TOKENS * scale) + 1
        prompt: list[int] = []
        for hash_id, end in zip(hash_ids, ends, strict=True):
            if len(prompt) == tokens:
                break
            prompt += self._block(hash_id, longest)[: min(end, tokens) - len(prompt)]
        return tuple(prompt)

    def _block(self, hash_id: int, tokens: int) -> tuple[int, ...]:
        if hash_id not in self._blocks:
            self._blocks[hash_id] = self._draw(Stream.SHARED_BLOCK, hash_id, tokens)
        return self._blocks[hash_id]

    def _draw(self, stream: Stream, number: int, tokens: int) -> tuple[int, ...]:
        drawn = generator(self._seed, stream, number).random(tokens) * len(self._ids)
        return tuple(map(self._ids.__getitem__, drawn.astype(int).tolist()))
