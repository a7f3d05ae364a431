"""The bytes of UTF-8 that a token stands for."""

from __future__ import annotations

import re

from tokenizers import Tokenizer as HFTokenizer

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


def _byte_level_alphabet() -> dict[str, int]:
    """Byte-level vocabularies write printable Latin-1 as itself, and the other bytes as U+0100 and on, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_ALPHABET = _byte_level_alphabet()


class TokenBytes:
    """Looks at tokens one by one, as decoding cannot show a part of a character."""

    def __init__(self, tokenizer: HFTokenizer) -> None:
        self._tokenizer = tokenizer
        self._added = frozenset(tokenizer.get_added_tokens_decoder())
        state = tokenizer.decoder.__getstate__() if tokenizer.decoder is not None else b""
        self._is_byte_level, self._falls_back = b'"ByteLevel"' in state, b'"ByteFallback"' in state

    def of(self, token_id: int) -> bytes:
        """Its bytes, empty for an id without a token; word borders are as the vocabulary writes them."""
        token = self._tokenizer.id_to_token(token_id)
        if token is None:
            return b""
        if self._falls_back and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(match[1], 16)])
        if self._is_byte_level and token_id not in self._added and all(character in _ALPHABET for character in token):
            return bytes(_ALPHABET[character] for character in token)
        return token.encode("utf-8", "replace")
