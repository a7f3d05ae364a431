"""Prompts of random token ids, or of random words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from fly_jax.bench.plan_limits import FIRST_RANDOM_ID
from fly_jax.bench.random_streams import Stream, generator

# For endpoints that take no token ids; each is about one token for the tokenizers of most models.
WORDS = (
    "the", "of", "and", "to", "in", "is", "was", "for", "on", "that", "with", "as", "his", "they", "at", "be", "this",
    "have", "from", "or", "one", "had", "by", "word", "but", "not", "what", "all", "were", "we", "when", "your", "can",
    "said", "there", "use", "an", "each", "which", "she", "do", "how", "their", "if", "will", "up", "other", "about",
    "out", "many", "then", "them", "these", "so", "some", "her", "would", "make", "like", "him", "into", "time",
)  # fmt: skip
# Mooncake's traces name each 512 tokens of a prompt by a hash.
BLOCK_TOKENS = 512
Prompt = str | tuple[int, ...]


class RandomPrompts:
    """Token ids drawn uniformly from ``[FIRST_RANDOM_ID, vocab_size)``, the same for the same seed and number.

    Args:
        as_text: common words in their place, for endpoints that take no token ids; the server's usage then says how
            many tokens they have.
    """

    def __init__(self, seed: int, vocab_size: int, *, as_text: bool = False) -> None:
        self._seed, self._as_text = seed, as_text
        # Prompts refer to one object for each id: 8 bytes a token, where a new int each would take 40.
        self._vocabulary: Sequence[Any] = WORDS if as_text else tuple(range(FIRST_RANDOM_ID, vocab_size))
        self._blocks: dict[int, tuple[Any, ...]] = {}

    def prompt(self, number: int, tokens: int) -> Prompt:
        """The prompt of request ``number``; of two lengths, the shorter begins the longer."""
        return self._whole(self._draw(Stream.PROMPT, number, tokens))

    def of_blocks(self, hash_ids: Sequence[int], tokens: int, scale: float) -> Prompt:
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
        prompt: list[Any] = []
        for hash_id, end in zip(hash_ids, ends, strict=True):
            if len(prompt) == tokens:
                break
            prompt += self._block(hash_id, longest)[: min(end, tokens) - len(prompt)]
        return self._whole(tuple(prompt))

    def _whole(self, drawn: tuple[Any, ...]) -> Prompt:
        return " ".join(drawn) if self._as_text else drawn

    def _block(self, hash_id: int, tokens: int) -> tuple[Any, ...]:
        if hash_id not in self._blocks:
            self._blocks[hash_id] = self._draw(Stream.SHARED_BLOCK, hash_id, tokens)
        return self._blocks[hash_id]

    def _draw(self, stream: Stream, number: int, tokens: int) -> tuple[Any, ...]:
        drawn = generator(self._seed, stream, number).random(tokens) * len(self._vocabulary)
        return tuple(map(self._vocabulary.__getitem__, drawn.astype(int).tolist()))
