"""Expected values are those of transformers 5.24 for the same folders."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from tokenizers import processors

from fly_jax.models.generation_config import eos_token_ids
from fly_jax.text.tokenizer import Tokenizer
from tests.fly_jax.tokenizer_families import FAMILIES

TEMPLATE = "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}"
S = {"bos_token": "<s>", "eos_token": "</s>"}
TURN = {"content": "<|turn|>", "lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
MAP = {"bos_token": "<|turn|>", "eos_token": TURN}
ADDED: dict[str, Any] = {"added_tokens_decoder": {}}
LLAMA = {"tokenizer_class": "LlamaTokenizer"}


def make_folder(
    folder: Path, config: dict[str, Any], special_map: dict[str, Any] | None = None, *, add: str = ""
) -> Tokenizer:
    made = FAMILIES["llama_2"]()
    if add:
        ids = [(token, made.token_to_id(token)) for token in ("<s>", "</s>")]
        made.post_processor = processors.TemplateProcessing(single=add, pair=f"{add} $B", special_tokens=ids)
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE, **config}))
    if special_map is not None:
        (folder / "special_tokens_map.json").write_text(json.dumps(special_map))
    return Tokenizer.of_folder(folder)


@pytest.mark.parametrize(
    ("config", "special_map", "rendered"),
    [
        (S, None, "<s>Hello</s>"),
        ({"eos_token": TURN}, None, "Hello<|turn|>"),
        ({}, MAP, "<|turn|>Hello<|turn|>"),
        (S, MAP, "<|turn|>Hello<|turn|>"),
        (S | ADDED, MAP, "<s>Hello</s>"),
        (ADDED, MAP, "Hello"),
        (LLAMA, None, "<s>Hello</s>"),
        ({"tokenizer_class": "LlamaTokenizerFast"}, None, "<s>Hello</s>"),
        (LLAMA | ADDED, MAP, "<s>Hello</s>"),
        (LLAMA | {"bos_token": None, "eos_token": "</s>"}, None, "Hello</s>"),
        ({"tokenizer_class": "PreTrainedTokenizerFast"}, None, "Hello"),
        ({}, None, "Hello"),
        # The vocabulary has no <|endoftext|>: transformers would add one, which the model has no embedding for.
        ({"tokenizer_class": "Qwen2Tokenizer"}, None, "Hello"),
    ],
)
def test_templates_get_the_folders_special_tokens(
    tmp_path: Path, config: dict[str, Any], special_map: dict[str, Any] | None, rendered: str
) -> None:
    tokenizer = make_folder(tmp_path, config, special_map)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}]) == rendered
    end = rendered.rpartition("Hello")[2]
    assert tokenizer.eos_token_id == (tokenizer._tokenizer.token_to_id(end) if end else None)


def test_a_token_that_a_folder_has_not_is_undefined_in_its_template(tmp_path: Path) -> None:
    template = "{% if bos_token is defined %}{{ bos_token }}{% else %}none{% endif %}"
    assert make_folder(tmp_path, {"chat_template": template}).apply_chat_template([]) == "none"


@pytest.mark.parametrize(
    ("add", "flags", "first", "last"),
    [
        ("", {}, False, False),
        ("", {"add_bos_token": True, "add_eos_token": True}, False, False),
        ("<s> $A", {}, True, False),
        ("<s> $A", {"add_bos_token": False}, True, False),
        ("<s> $A", {"add_bos_token": True, "add_eos_token": True}, True, False),
        ("<s> $A </s>", {"add_bos_token": False, "add_eos_token": False}, True, True),
    ],
)
def test_the_post_processor_alone_says_what_is_added_to_a_prompt(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, add: str, flags: dict[str, bool], first: bool, last: bool
) -> None:
    """Of transformers 4.57, LlamaTokenizerFast followed the flags instead, with BOS by default."""
    with caplog.at_level(logging.WARNING, "fly_jax.text.tokenizer"):
        tokenizer = make_folder(tmp_path, LLAMA | flags, add=add)
    tokens = tokenizer.encode("the time")
    inner = tokenizer.encode("the time", add_special_tokens=False)
    bos, eos = (tokenizer._tokenizer.token_to_id(token) for token in ("<s>", "</s>"))
    assert tokens == [bos] * first + inner + [eos] * last
    wrong = [
        name
        for name, is_added in (("add_bos_token", first), ("add_eos_token", last))
        if flags.get(name, is_added) != is_added
    ]
    assert [name for record in caplog.records for name in wrong if name in record.getMessage()] == wrong
    assert len(caplog.records) == len(wrong)


@pytest.mark.parametrize(
    ("generation", "model", "expected"),
    [(None, None, {9}), (None, 3, {3, 9}), ([4, 5], 3, {4, 5, 9}), (9, None, {9})],
)
def test_the_tokenizers_own_end_counts_besides_the_models(
    tmp_path: Path, generation: object, model: object, expected: set[int]
) -> None:
    for name, value in (("generation_config.json", generation), ("config.json", model)):
        (tmp_path / name).write_text(json.dumps({} if value is None else {"eos_token_id": value}))
    assert eos_token_ids("auto", tmp_path, 9) == expected
    assert eos_token_ids("auto", tmp_path, None) == expected - ({9} if generation != 9 else set())


@pytest.mark.parametrize(("add", "expected"), [("<s> $A", ["<s>"]), ("", [])])
def test_an_empty_prompt_is_what_the_tokenizer_puts_around_it(tmp_path: Path, add: str, expected: list[str]) -> None:
    tokenizer = make_folder(tmp_path, S, add=add)
    assert tokenizer.encode("") == [tokenizer._tokenizer.token_to_id(token) for token in expected]
