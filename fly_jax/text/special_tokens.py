"""Which texts a model folder means by BOS, EOS, UNK and PAD."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fly_jax.host.json_files import read_json

_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
_LLAMA = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
_END_OF_TEXT = dict.fromkeys(("eos_token", "unk_token"), "<|endoftext|>")
# What transformers' classes take for tokens that a folder does not name; a name with Fast at its end is the same class.
_DEFAULTS = {
    "LlamaTokenizer": _LLAMA,
    "CodeLlamaTokenizer": _LLAMA,
    "Qwen2Tokenizer": _END_OF_TEXT | {"pad_token": "<|endoftext|>"},
    "GPT2Tokenizer": _END_OF_TEXT | {"bos_token": "<|endoftext|>"},
    "GemmaTokenizer": {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>"},
}
_CLASS_OF_MODEL = {"qwen2": "Qwen2Tokenizer"}


def special_tokens_of(folder: Path, is_token: Callable[[str], bool]) -> dict[str, str]:
    """Texts by name (``bos_token``), as transformers finds them; a token that there is none of is left out.

    ``tokenizer_config.json`` names them; ``special_tokens_map.json`` comes before it in folders of the time before
    ``added_tokens_decoder``; for those that neither mentions, not even as null, the tokenizer's class has defaults.

    Args:
        is_token: whether the vocabulary has a text as one token: a default that it lacks is none.

    Raises:
        CheckpointError: a file is damaged.
    """
    config = _read(folder / "tokenizer_config.json")
    legacy = {} if "added_tokens_decoder" in config else _read(folder / "special_tokens_map.json")
    name = config.get("tokenizer_class") or _CLASS_OF_MODEL.get(str(_read(folder / "config.json").get("model_type")))
    defaults = _DEFAULTS.get(str(name).removesuffix("Fast"), {})
    found = {name: text for name, text in defaults.items() if is_token(text)}
    given = config | legacy
    found |= {name: _text(given[name]) for name in _NAMES if name in given}
    return {name: text for name, text in found.items() if text}


def _read(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _text(token: Any) -> str:
    """A token is written as its text or as an object with its ``content``."""
    return str(token.get("content") or "") if isinstance(token, dict) else str(token or "")
