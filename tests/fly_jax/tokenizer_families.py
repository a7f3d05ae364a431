"""A small tokenizer of each family that published models have, trained on a few lines."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache

from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as HFTokenizer

from fly_jax.text.tokenizer import Tokenizer

BOS, EOS, TURN = "<s>", "</s>", "<|turn|>"
_CORPUS = [
    "Once upon a time there was a time when time was upon us all.",
    "the cat, the dog and the time",
    "1 2 3 4",
] * 4


def _added(tokenizer: HFTokenizer) -> HFTokenizer:
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (BOS, EOS, TURN)])
    return tokenizer


def _byte_fallback() -> HFTokenizer:
    """Merges of the corpus, and a token for each byte of all other characters."""
    trained = HFTokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(_CORPUS, trainers.BpeTrainer(vocab_size=90, show_progress=False))  # type: ignore[call-arg]
    learnt = json.loads(trained.to_str())["model"]
    words = ["<unk>", BOS, EOS, *(f"<0x{byte:02X}>" for byte in range(256)), *learnt["vocab"]]
    vocabulary = {word: index for index, word in enumerate(words)}
    merges = [tuple(pair) for pair in learnt["merges"]]
    tokenizer = HFTokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def llama_2() -> HFTokenizer:
    tokenizer = _byte_fallback()
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return _added(tokenizer)


def mistral() -> HFTokenizer:
    """As files written since tokenizers 0.19 have it: the prefix space comes at the first word only."""
    tokenizer = _byte_fallback()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    return _added(tokenizer)


def byte_level() -> HFTokenizer:
    tokenizer = HFTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)  # type: ignore[call-arg]
    tokenizer.train_from_iterator(_CORPUS, trainer)
    return _added(tokenizer)


def unigram() -> HFTokenizer:
    words = ["▁time", "▁the", "▁a", "▁Once", "▁upon", "▁cat"]
    pieces = [
        ("<unk>", -9.0),
        *((word, -2.0) for word in words),
        *((letter, -4.0) for letter in "▁timehOncupoas12é漢字"),
    ]
    tokenizer = HFTokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return _added(tokenizer)


def word_piece() -> HFTokenizer:
    words = ["[UNK]", "once", "upon", "a", "time", "the", "cat", "##s", ",", ".", "'", "t", "don"]
    tokenizer = HFTokenizer(models.WordPiece({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return _added(tokenizer)


FAMILIES: dict[str, Callable[[], HFTokenizer]] = {
    make.__name__: make for make in (llama_2, mistral, byte_level, unigram, word_piece)
}


@cache
def family(name: str) -> Tokenizer:
    return Tokenizer(FAMILIES[name]())
