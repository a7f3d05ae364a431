from __future__ import annotations

import pickle
import random
from collections.abc import Callable

import pytest
from tokenizers import AddedToken, Regex, normalizers, pre_tokenizers
from tokenizers import Tokenizer as HFTokenizer

from fly_jax.text.chat_template import ChatTemplate
from fly_jax.text.longest_token import longest_token
from fly_jax.text.tokenizer import Tokenizer
from tests.fly_jax.tokenizer_families import FAMILIES

COMPOSED = "e\u0301"
ALPHABET = ["once", "upon", "time", " ", "   ", "\n", "1", "é", COMPOSED, "\u1f80\u0300", "字", "🌍", "\u200d", "<s>"]


def texts(count: int = 200) -> list[str]:
    draw = random.Random(0)
    return ["".join(draw.choices(ALPHABET, k=draw.randint(0, 40))) for _ in range(count)]


def with_nfc(made: HFTokenizer) -> HFTokenizer:
    made.normalizer = normalizers.NFC()
    return made


@pytest.mark.parametrize(
    "make",
    [FAMILIES["llama_2"], FAMILIES["mistral"], FAMILIES["byte_level"], lambda: with_nfc(FAMILIES["byte_level"]())],
)
def test_no_text_has_fewer_tokens_than_its_length_says(make: Callable[[], HFTokenizer]) -> None:
    tokenizer = Tokenizer(make())
    assert tokenizer.fewest_tokens(10**6) > 10**4
    for text in [*texts(), COMPOSED * 500, "time" * 500, "🌍" * 500]:
        assert len(tokenizer.encode(text, add_special_tokens=False)) >= tokenizer.fewest_tokens(len(text))


def test_steps_that_are_none_change_nothing() -> None:
    """Published files have sequences of no normalizers, and sequences within sequences."""
    plain, made = FAMILIES["byte_level"](), FAMILIES["byte_level"]()
    made.normalizer = normalizers.Sequence([])
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Sequence([]), pre_tokenizers.Sequence([byte_level])])
    assert longest_token(made) == longest_token(plain)
    made.pre_tokenizer = pre_tokenizers.Sequence([])
    assert longest_token(made) is None


def _strips(made: HFTokenizer) -> None:
    made.normalizer = normalizers.Strip()


def _replaces_blanks(made: HFTokenizer) -> None:
    made.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace(Regex(" +"), " ")])


def _shortens(made: HFTokenizer) -> None:
    made.normalizer = normalizers.Replace("    ", " ")


def _removes_blanks(made: HFTokenizer) -> None:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(" ", "removed"), byte_level])


def _drops_bytes(made: HFTokenizer) -> None:
    made.pre_tokenizer = pre_tokenizers.Digits()


def _swallows(made: HFTokenizer) -> None:
    made.add_special_tokens([AddedToken("<mask>", lstrip=True, special=True)])


@pytest.mark.parametrize(
    "change", [_strips, _replaces_blanks, _shortens, _removes_blanks, _drops_bytes, _swallows], ids=lambda f: f.__name__
)
def test_nothing_is_said_of_a_tokenizer_that_may_make_nothing_of_much(change: Callable[[HFTokenizer], None]) -> None:
    made = FAMILIES["byte_level"]()
    assert longest_token(made) is not None
    change(made)
    assert longest_token(made) is None
    assert Tokenizer(made).fewest_tokens(10**9) == 0


@pytest.mark.parametrize("family", ["unigram", "word_piece"])
def test_nothing_is_said_of_a_vocabulary_with_unknown_words(family: str) -> None:
    assert longest_token(FAMILIES[family]()) is None


def test_a_copy_in_another_process_does_the_same() -> None:
    template = ChatTemplate("{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}", {"bos_token": "<s>"})
    tokenizer = Tokenizer(FAMILIES["llama_2"](), template, {"bos_token": "<s>", "eos_token": "</s>"})
    copy: Tokenizer = pickle.loads(pickle.dumps(tokenizer))
    messages = [{"role": "user", "content": "the time 🌍"}]
    assert copy.apply_chat_template(messages) == tokenizer.apply_chat_template(messages) == "<s>the time 🌍"
    assert copy.encode("the time 🌍") == tokenizer.encode("the time 🌍")
    assert (copy.eos_token_id, copy.fewest_tokens(99)) == (tokenizer.eos_token_id, tokenizer.fewest_tokens(99))
