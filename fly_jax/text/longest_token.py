"""How much text one token can stand for, so that a text can be known to be too long without being tokenized."""

from __future__ import annotations

import json
from typing import Any

from tokenizers import Tokenizer as HFTokenizer
from tokenizers import models, pre_tokenizers

# NFC and NFKC may make one character of several: no character decomposes into more than this many.
_COMPOSED = 4
# Steps that take no character away, and how many characters one of theirs may have been.
_NORMALIZERS = {
    "NFD": 1,
    "NFKD": 1,
    "NFC": _COMPOSED,
    "NFKC": _COMPOSED,
    "Lowercase": 1,
    "Prepend": 1,
    "ByteLevel": 1,
}
_PRE_TOKENIZERS = frozenset({"ByteLevel", "Metaspace", "Digits", "UnicodeScripts"})
# These cut at what they find, and may throw it away.
_CUTTERS = frozenset({"Split", "Punctuation"})


def longest_token(tokenizer: HFTokenizer) -> int | None:
    """Most characters of a text that one token can stand for; None where it cannot be told.

    It cannot where something takes characters away (a normalizer that strips, a special token that swallows the blanks
    around it) or makes one token of any number of them (an unknown word).
    """
    normalizers, cuts = _steps(tokenizer.normalizer), _steps(tokenizer.pre_tokenizer)
    factor = 1
    for step in normalizers:
        composed = _composed(step)
        if composed is None:
            return None
        factor *= composed
    if not all(map(_keeps_all, cuts)) or not _covers_all(tokenizer, normalizers + cuts):
        return None
    added = tokenizer.get_added_tokens_decoder().values()
    if any(token.lstrip or token.rstrip for token in added):
        return None
    return factor * max(map(len, tokenizer.get_vocab()))


def _steps(part: Any) -> list[dict[str, Any]]:
    """The descriptions of a normalizer or pre-tokenizer and of those that it is made of."""
    if part is None:
        return []

    def flat(state: dict[str, Any]) -> list[dict[str, Any]]:
        if state["type"] != "Sequence":
            return [state]
        inner = state["normalizers"] if "normalizers" in state else state["pretokenizers"]
        return [step for each in inner for step in flat(each)]

    return flat(json.loads(part.__getstate__()))


def _composed(normalizer: dict[str, Any]) -> int | None:
    """Of how many characters one may have been made; None: of any number."""
    if normalizer["type"] == "Replace":
        replaced = normalizer["pattern"].get("String")
        return 1 if replaced is not None and len(normalizer["content"]) >= len(replaced) else None
    return _NORMALIZERS.get(normalizer["type"])


def _keeps_all(pre_tokenizer: dict[str, Any]) -> bool:
    if pre_tokenizer["type"] in _CUTTERS:
        return str(pre_tokenizer["behavior"]) != "Removed"
    return pre_tokenizer["type"] in _PRE_TOKENIZERS


def _covers_all(tokenizer: HFTokenizer, steps: list[dict[str, Any]]) -> bool:
    """Every character has tokens of its own: those of its bytes, if no other."""
    if not isinstance(tokenizer.model, models.BPE):
        return False
    if any(step["type"] == "ByteLevel" for step in steps):
        names = pre_tokenizers.ByteLevel.alphabet()
    elif tokenizer.model.byte_fallback:
        names = [f"<0x{byte:02X}>" for byte in range(256)]
    else:
        return False
    return all(tokenizer.token_to_id(name) is not None for name in names)
