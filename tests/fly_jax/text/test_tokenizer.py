from __future__ import annotations

import json
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import decoders, models

from fly_jax.errors import CheckpointError, InvalidRequestError
from fly_jax.text import chat_template
from fly_jax.text.chat_template import MAX_TEMPLATE_OUTPUT
from fly_jax.text.text_stream import TextStream
from fly_jax.text.tokenizer import Tokenizer
from tests.fly_jax.builders import make_tokenizer
from tests.tiny_models import BOS_ID, CASES, EOS_ID, IM_END_ID, IM_START_ID, tokenizer_json

MESSAGES = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def render(folder: Path, template: Any, messages: list[dict[str, Any]] | None = None, **variables: Any) -> str:
    tokenizer = make_tokenizer(folder, chat_template=template)
    return tokenizer.apply_chat_template(MESSAGES if messages is None else messages, **variables)


def stream_text(stream: TextStream, tokens: list[int]) -> str:
    return "".join(stream.push(token) for token in tokens) + stream.flush()


class TestTextStream:
    @given(tokens=st.lists(st.integers(0, 283) | st.sampled_from(list("né€😀".encode())), max_size=30))
    def test_any_tokens_give_the_text_that_they_decode_to(self, tokenizer: Tokenizer, tokens: list[int]) -> None:
        assert stream_text(tokenizer.stream(True), tokens) == tokenizer.decode(tokens)
        assert stream_text(tokenizer.stream(False), tokens) == tokenizer.decode(tokens, skip_special_tokens=False)

    @given(text=st.text(max_size=30))
    def test_encoded_text_comes_back_in_whole_characters(self, tokenizer: Tokenizer, text: str) -> None:
        tokens = tokenizer.encode(text, add_special_tokens=False)
        stream, seen = tokenizer.stream(True), ""
        for token in tokens:
            seen += stream.push(token)
            assert text.startswith(seen)
        assert seen + stream.flush() == text

    def test_a_flush_gives_nothing_twice(self, tokenizer: Tokenizer) -> None:
        stream = tokenizer.stream(True)
        assert [stream.push(token) for token in "é".encode()] == ["", "é"]
        assert stream.flush() == ""
        assert stream.push("é".encode()[0]) == ""
        assert stream.flush() == "\ufffd"
        assert stream.flush() == ""

    @given(pieces=st.lists(st.sampled_from(["▁the", "▁", "cat", "\n", "é", "€", "😀"]), max_size=12))
    def test_a_sentencepiece_vocabulary_keeps_its_spaces_and_byte_tokens(self, pieces: list[str]) -> None:
        tokenizer = sentencepiece_tokenizer()
        tokens = [token for piece in pieces for token in byte_fallback(tokenizer, piece)]
        assert stream_text(TextStream(tokenizer, frozenset()), tokens) == tokenizer.decode(tokens)

    @given(words=st.lists(st.sampled_from(["▁the", "▁", "cat", "<0xE2>", "<0x82>", "<0xAC>", "<0x0A>"]), max_size=12))
    def test_byte_tokens_that_are_not_utf8_do_not_disturb_their_neighbours(self, words: list[str]) -> None:
        tokenizer = sentencepiece_tokenizer()
        text = stream_text(TextStream(tokenizer, frozenset()), [tokenizer.token_to_id(word) for word in words])
        letters = [word.removeprefix("▁") for word in words if not word.startswith("<")]
        assert "".join(letter for letter in text if letter in "thecat") == "".join(letters)

    @given(
        runs=st.lists(
            st.lists(st.integers(0x80, 0xFF).map("<0x{:02X}>".format), min_size=20, max_size=90)
            | st.lists(st.sampled_from(["▁the", "cat"]), max_size=3),
            max_size=6,
        )
    )
    def test_long_runs_of_byte_tokens_that_are_not_utf8_do_not_disturb_their_neighbours(
        self, runs: list[list[str]]
    ) -> None:
        tokenizer = sentencepiece_tokenizer()
        words = [word for run in runs for word in run]
        text = stream_text(TextStream(tokenizer, frozenset()), [tokenizer.token_to_id(word) for word in words])
        letters = "".join(word.removeprefix("▁") for word in words if not word.startswith("<"))
        assert "".join(letter for letter in text if letter in "thecat") == letters

    def test_a_token_may_turn_text_that_is_already_out_into_invalid_bytes(self) -> None:
        tokenizer = sentencepiece_tokenizer()
        stream = TextStream(tokenizer, frozenset())
        words = ["cat", "<0x0A>", "<0xE2>", "▁the"]
        assert [stream.push(tokenizer.token_to_id(word)) for word in words] == ["cat", "\n", "", "\ufffd the"]

    @given(st.data())
    def test_long_runs_of_bytes_that_are_not_utf8_lose_nothing(self, tokenizer: Tokenizer, data: st.DataObject) -> None:
        bad = st.integers(0x80, 0xBF) | st.sampled_from([0xC3, 0xE2, 0xF0, 0xFF, EOS_ID, 999])
        run = st.lists(bad, min_size=20, max_size=60) | st.just(list("né€😀".encode()))
        runs = data.draw(st.lists(run, max_size=6))
        tokens = [token for run in runs for token in run]
        assert stream_text(tokenizer.stream(True), tokens) == tokenizer.decode(tokens)
        assert stream_text(tokenizer.stream(False), tokens) == tokenizer.decode(tokens, skip_special_tokens=False)

    @given(text=st.text(st.sampled_from("thecat\néß€漢😀\ufffd"), min_size=20, max_size=60))
    def test_long_runs_of_byte_tokens_that_are_utf8_lose_nothing(self, text: str) -> None:
        tokenizer = sentencepiece_tokenizer()
        tokens = [token for character in text for token in byte_fallback(tokenizer, character)]
        assert stream_text(TextStream(tokenizer, frozenset()), tokens) == tokenizer.decode(tokens) == text

    def test_a_character_may_have_skipped_tokens_inside(self, tokenizer: Tokenizer) -> None:
        first, second = "é".encode()
        stream = tokenizer.stream(True)
        assert [stream.push(token) for token in (first, *[EOS_ID] * 100, second)] == [""] * 101 + ["é"]

    @pytest.mark.parametrize("token", [EOS_ID, 999, 0x80, 0xF0, ord("a")], ids=["eos", "unknown", "0x80", "0xf0", "a"])
    @pytest.mark.parametrize("skip", [True, False])
    def test_a_token_repeated_without_end_takes_the_same_time_each(
        self, tokenizer: Tokenizer, token: int, skip: bool
    ) -> None:
        decoder = CountingDecoder(tokenizer)
        stream = TextStream(decoder, frozenset([EOS_ID]) if skip else frozenset())  # type: ignore[arg-type]
        text = stream_text(stream, [token] * 2000)
        assert text == tokenizer.decode([token] * 2000, skip_special_tokens=skip)
        assert decoder.longest <= 64

    def test_invalid_bytes_are_out_before_the_end(self, tokenizer: Tokenizer) -> None:
        stream = tokenizer.stream(True)
        assert len("".join(stream.push(0x80) for _ in range(1000))) > 950


class CountingDecoder:
    """A tokenizer that remembers how many tokens it had to decode at once."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.longest = 0

    def id_to_token(self, token_id: int) -> str | None:
        return self._tokenizer._tokenizer.id_to_token(token_id)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        self.longest = max(self.longest, len(token_ids))
        return self._tokenizer.decode(token_ids, skip_special_tokens)


def sentencepiece_tokenizer() -> HFTokenizer:
    """Words, and a token for each byte, as in Llama 2 and Mistral."""
    words = ["<unk>", "▁the", "▁", "cat", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = HFTokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def byte_fallback(tokenizer: HFTokenizer, piece: str) -> list[int]:
    """A word's token, or the tokens of its bytes."""
    known = tokenizer.token_to_id(piece)
    return [known] if known is not None else [tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in piece.encode()]


def test_special_tokens_are_read_in_text_and_added_only_when_asked_for(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("<|im_start|>a<|im_end|>", add_special_tokens=False) == [IM_START_ID, ord("a"), IM_END_ID]
    assert tokenizer.encode("a") == [BOS_ID, ord("a")]
    assert tokenizer.decode([IM_START_ID, ord("a")]) == "a"
    assert tokenizer.decode([IM_START_ID, ord("a")], skip_special_tokens=False) == "<|im_start|>a"


@pytest.mark.parametrize(("content", "message"), [(None, "is missing"), ("{", "cannot be read"), ("{}", "cannot be")])
def test_a_folder_without_a_usable_tokenizer_is_refused_by_path(
    tmp_path: Path, content: str | None, message: str
) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        Tokenizer.of_folder(tmp_path)
    assert str(tmp_path / "tokenizer.json") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_truncation_and_padding_of_the_file_are_switched_off(tmp_path: Path) -> None:
    raw = tokenizer_json(CASES["llama_mha"])
    raw["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    raw["padding"] = {
        "strategy": {"Fixed": 16}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
        "pad_token": "x",
    }  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    tokenizer = Tokenizer.of_folder(tmp_path)
    assert tokenizer.encode("ab", add_special_tokens=False) == list(b"ab")
    assert tokenizer.encode("abcdefgh", add_special_tokens=False) == list(b"abcdefgh")


class TestChatTemplate:
    def test_a_conversation_is_written_out_with_its_special_tokens(self, tokenizer: Tokenizer) -> None:
        prompt = tokenizer.apply_chat_template(MESSAGES)
        assert prompt == "<|bos|><|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
        assert tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=False).endswith("Hi<|im_end|>\n")

    def test_a_model_without_a_template_says_what_to_use_instead(self, tmp_path: Path) -> None:
        tokenizer = make_tokenizer(tmp_path, chat_template=None)
        assert not tokenizer.has_chat_template
        with pytest.raises(InvalidRequestError, match="no chat template: use /v1/completions") as caught:
            tokenizer.apply_chat_template(MESSAGES)
        assert caught.value.param == "messages"

    def test_a_template_file_comes_before_the_config(self, tmp_path: Path) -> None:
        (tmp_path / "chat_template.jinja").write_text("from the file")
        assert render(tmp_path, "from the config") == "from the file"

    def test_of_several_named_templates_the_default_is_taken(self, tmp_path: Path) -> None:
        named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
        assert render(tmp_path, named) == "plain"

    def test_blocks_leave_no_blank_lines(self, tmp_path: Path) -> None:
        template = (
            "{% for message in messages %}\n    {%- if true %}\n{{ message.content }}\n    {% endif %}\n{% endfor %}"
        )
        assert render(tmp_path, template, [{"content": "a"}, {"content": "b"}]) == "a\nb\n"

    def test_loop_controls_and_extra_variables_are_there(self, tmp_path: Path) -> None:
        template = (
            "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.content }}{% endfor %}{{ x }}"
        )
        assert render(tmp_path, template, MESSAGES * 3, x=7) == "Hi7"

    def test_tools_and_documents_are_none_where_there_are_none(self, tmp_path: Path) -> None:
        """The value is that of transformers 5.24 and 4.57; Mistral's templates write tools where this is not so."""
        template = "{{ tools is defined and documents is defined }}{% if tools is not none %}[TOOLS]{% endif %}"
        assert render(tmp_path, template) == "True"

    def test_a_template_may_refuse_messages(self, tmp_path: Path) -> None:
        with pytest.raises(InvalidRequestError, match="refused the messages: roles must alternate") as caught:
            render(tmp_path, "{{ raise_exception('roles must alternate') }}")
        assert caught.value.param == "messages"

    @pytest.mark.parametrize(
        ("arguments", "expected"),
        [
            ("", '{"b": "é<", "a": 1}'),
            ("indent=2", '{\n  "b": "é<",\n  "a": 1\n}'),
            ("ensure_ascii=True", '{"b": "\\u00e9<", "a": 1}'),
            ("sort_keys=True", '{"a": 1, "b": "é<"}'),
            ("separators=(',', ':')", '{"b":"é<","a":1}'),
        ],
    )
    def test_tojson_writes_plain_json_as_in_transformers(self, tmp_path: Path, arguments: str, expected: str) -> None:
        assert render(tmp_path, f"{{{{ x | tojson({arguments}) }}}}", x={"b": "é<", "a": 1}) == expected

    @pytest.mark.parametrize(
        "expression",
        [
            "''.__class__.__mro__",
            "''.__class__.__mro__[1].__subclasses__()",
            "messages.__class__.__base__",
            "messages.append(1)",
            "messages[0].update(role='system')",
            "messages[0].clear()",
            "raise_exception.__globals__['json']",
            "cycler.__init__.__globals__.os.popen('id').read()",
            "lipsum.__globals__['os']",
            "self.__init__.__globals__",
            "''['__class__']['__mro__']",
            "(''|attr('__class__')).__mro__",
            "'{0.__class__.__mro__}'.format('')",
            "'%s'|format(''.__class__.__mro__)",
        ],
    )
    def test_the_sandbox_refuses_a_way_out(self, tmp_path: Path, expression: str) -> None:
        messages = [{"role": "user", "content": "Hi"}]
        with pytest.raises(InvalidRequestError, match="the chat template refused the messages"):
            render(tmp_path, "{{ " + expression + " }}", messages)
        assert messages == [{"role": "user", "content": "Hi"}]

    def test_an_internal_attribute_is_never_shown(self, tmp_path: Path) -> None:
        assert render(tmp_path, "[{{ ''.__class__ }}{{ messages.__len__ }}]") == "[]"

    @pytest.mark.parametrize(
        "template",
        [
            "{{ messages[5].content.strip() }}",
            "{{ messages[0].content + 1 }}",
            "{{ no_such_function() }}",
            "{{ 1 / 0 }}",
            "{{ messages[0].content.encode('ascii', 'x').decode(3) }}",
            "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
            "{{ [1, 2] | map('no_such_filter') | list }}",
            "{{ messages[0].content.index('zzz') }}",
        ],
    )
    def test_any_failure_of_a_template_is_that_requests_error(self, tmp_path: Path, template: str) -> None:
        with pytest.raises(InvalidRequestError, match="the chat template refused the messages") as caught:
            render(tmp_path, template)
        assert caught.value.param == "messages"

    @pytest.mark.parametrize(
        "template",
        [
            "{% for i in range(90000) %}{{ 'x' * 1000 }}{% endfor %}",
            "{% for i in range(9000) %}{% for j in range(9000) %}{{ 'xxxxxxxx' * 64 }}{% endfor %}{% endfor %}",
        ],
    )
    def test_output_is_bounded(self, tmp_path: Path, template: str) -> None:
        with pytest.raises(InvalidRequestError, match=f"wrote more than {MAX_TEMPLATE_OUTPUT} characters"):
            render(tmp_path, template)

    def test_a_huge_range_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(InvalidRequestError, match="refused the messages: Range too big"):
            render(tmp_path, "{% for i in range(1000000000) %}{% endfor %}")

    @pytest.mark.parametrize(
        "template",
        [
            "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
            "{% for i in range(100000) %}{% for j in range(100000) if loop %}{{ loop.last }}{% endfor %}{% endfor %}",
            "{% macro a() %}{% for i in messages * 100000 %}{% endfor %}{% endmacro %}"
            "{% for i in range(100000) %}{{ a() }}{% endfor %}",
            "{% for i in [0] * 9 recursive %}{{ loop([0] * 9) }}{% endfor %}",
        ],
    )
    def test_time_is_bounded(self, tmp_path: Path, template: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(chat_template, "MAX_TEMPLATE_SECONDS", 0.3)
        started = time.thread_time()
        with pytest.raises(InvalidRequestError, match=r"took more than|recursion") as caught:
            render(tmp_path, template)
        assert time.thread_time() - started < 2
        assert caught.value.param == "messages"

    def test_macros_that_call_each_other_end_in_time(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(chat_template, "MAX_TEMPLATE_SECONDS", 0.3)
        macros = ["{% macro m0() %}{% endmacro %}"]
        for n in range(1, 40):
            call = f"{{{{ m{n - 1}() }}}}"
            macros.append(f"{{% macro m{n}() %}}{call}{call}{{% endmacro %}}")
        with pytest.raises(InvalidRequestError, match=r"took more than 0\.3 s: shorten the messages"):
            render(tmp_path, "".join(macros) + "{{ m39() }}")

    @pytest.mark.parametrize(
        "template",
        [
            "{{ ('x' * 10**9) | length }}",
            "{{ (10**9 * 'x') | length }}",
            "{{ ([0] * 10**9) | length }}",
            "{{ 10 ** (10 ** 10) }}",
            "{% set n = namespace(x='x') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
            "{% set n = namespace(x='x') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
            "{{ messages[0].content.ljust(10**8) | length }}",
            "{% set n = namespace(x=3) %}{% for i in range(60) %}{% set n.x = n.x * n.x %}{% endfor %}",
            "{{ ('%100000000d' % 1) | length }}",
        ],
    )
    def test_values_are_bounded(self, tmp_path: Path, template: str) -> None:
        with pytest.raises(InvalidRequestError, match=r"made an? (value|integer) of more than \d+ ") as caught:
            render(tmp_path, template)
        assert caught.value.param == "messages"

    def test_loops_keep_what_they_can_do(self, tmp_path: Path) -> None:
        template = (
            "{% for m in messages %}{{ loop.index }}/{{ loop.length }}{{ ',' if not loop.last }}{% endfor %}"
            "{% for a, b in {'x': 1} | items %}{{ a ~ b }}{% endfor %}{% for n in none_such %}{% else %}-{% endfor %}"
            "{% for i in range(5) if i % 2 %}{{ i * 2 }}{{ '.' * i }}{% endfor %}"
            "{% for i in [[1], []] recursive %}[{{ loop(i) if i is iterable }}]{% endfor %}"
        )
        assert render(tmp_path, template, MESSAGES * 2) == "1/2,2/2x1-2.6...[[]][]"

    def test_the_assistants_part_may_be_marked(self, tmp_path: Path) -> None:
        body = "{{ m.content }}{{ loop.index }}"
        template = f"{{% for m in messages %}}{{% generation %}}{body}{{% endgeneration %}}!{{% endfor %}}"
        assert render(tmp_path, template) == "Hi1!"

    def test_a_template_may_state_the_date(self, tmp_path: Path) -> None:
        before = datetime.now()
        text = render(tmp_path, "{{ strftime_now('%Y-%m-%d') }}")
        assert before.date() <= datetime.strptime(text, "%Y-%m-%d").date() <= datetime.now().date()

    @pytest.mark.parametrize(
        ("template", "says"),
        [
            ([{"name": "default"}], "every entry of chat_template must have a name and a template"),
            (["plain"], "every entry of chat_template must have a name and a template"),
            ([{"name": "default", "template": 5}], "must be text or a list of templates, not int"),
            ({"default": "plain"}, "must be text or a list of templates, not dict"),
        ],
    )
    def test_a_damaged_template_is_a_broken_checkpoint(self, tmp_path: Path, template: Any, says: str) -> None:
        with pytest.raises(CheckpointError, match=says) as caught:
            make_tokenizer(tmp_path, chat_template=template)
        assert str(tmp_path / "tokenizer_config.json") in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_a_template_file_that_is_not_utf8_is_refused_by_path(self, tmp_path: Path) -> None:
        (tmp_path / "chat_template.jinja").write_bytes(b"caf\xe9")
        with pytest.raises(CheckpointError, match=r"chat_template\.jinja cannot be read as UTF-8 text") as caught:
            make_tokenizer(tmp_path)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("template", ["{% for %}", "{{ x", "{{ x | no_such_filter }}", "{% unknown %}"])
    def test_a_template_that_is_not_jinja_is_a_broken_checkpoint(self, tmp_path: Path, template: str) -> None:
        with pytest.raises(CheckpointError, match="chat template is not valid Jinja"):
            make_tokenizer(tmp_path, chat_template=template)

    def test_special_tokens_are_read_in_both_spellings(self, tmp_path: Path) -> None:
        tokenizer = make_tokenizer(
            tmp_path,
            bos_token={"content": "<B>", "lstrip": False},
            pad_token=None,
            chat_template="{{ bos_token }}|{{ pad_token }}",
        )
        assert tokenizer.apply_chat_template(MESSAGES) == "<B>|"


def test_settings_that_are_no_json_object_are_refused_by_path(tmp_path: Path) -> None:
    make_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(["not", "an", "object"]))
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json holds list, expected a JSON object"):
        Tokenizer.of_folder(tmp_path)
