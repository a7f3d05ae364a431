"""Where tokens are said to be in a choice's text."""

from __future__ import annotations

import pytest

from fly_jax.logprobs import TokenLogprob
from serving.logprobs import CompletionLogprobWriter, TokenNames
from tests.fly_jax.builders import own_logprobs
from tests.fly_jax.tokenizer_families import BOS, EOS, TURN, family

TIME = {"llama_2": "▁time", "mistral": "▁time", "byte_level": "Ġtime", "unigram": "▁time"}
TEXTS = [
    "Once upon a time",
    f"{BOS}Once upon {TURN}a",
    f"{TURN}the time{EOS} the",
    f"the{EOS}{TURN}{EOS}",
]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", TIME)
@pytest.mark.parametrize("adds_bos", [True, False])
@pytest.mark.parametrize("skip", [True, False])
def test_offsets_in_an_echoed_text_are_where_the_tokens_are(name: str, text: str, adds_bos: bool, skip: bool) -> None:
    """Special tokens are in an echo as the client wrote them, whatever becomes of those of the output."""
    tokenizer = family(name)
    following = tokenizer._tokenizer.token_to_id(TIME[name])
    bos = tokenizer._tokenizer.token_to_id(BOS)
    tokens = [*([bos] if adds_bos and not text.startswith(BOS) else []), *tokenizer.encode(text)]
    writer = CompletionLogprobWriter(TokenNames(tokenizer, as_ids=False), 0, tokens, skip_special_tokens=skip)
    writer.start_at(len(text))
    writer.add_prompt(own_logprobs(tokens[1:], [-1.0] * (len(tokens) - 1)), text)
    writer.add([TokenLogprob(following, -1.0)])
    found = writer.take()
    whole = text + tokenizer.stream(skip, tokens).push(following)
    added = [(token, offset) for token, offset in zip(found.tokens, found.text_offset, strict=True)]
    if adds_bos and not text.startswith(BOS):
        assert added.pop(0) == (BOS, 0)
    for token, offset in added:
        assert whole[offset:].startswith((token, token.strip(" ") or " ")), (token, offset, whole)
    assert added[-1][1] == len(text)


def test_offsets_of_a_prompt_of_ids_are_those_of_its_decoded_text() -> None:
    tokenizer = family("llama_2")
    tokens = tokenizer.encode(f"{BOS}Once{TURN}")
    for skip, expected in ((True, [0, 0, 4]), (False, [0, 3, 8])):
        writer = CompletionLogprobWriter(TokenNames(tokenizer, as_ids=False), 0, tokens, skip_special_tokens=skip)
        writer.add_prompt(own_logprobs(tokens[1:], [-1.0] * (len(tokens) - 1)), None)
        assert writer.take().text_offset == expected
        assert tokenizer.decode(tokens, skip_special_tokens=skip) == ("Once" if skip else f"{BOS} Once{TURN}")
