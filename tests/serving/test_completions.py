from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest

from tests.serving.scripted_engine import BOS, REPLY, ScriptedEngine, prompt_logprob, token_logprob

MODEL = "scripted"
ALL_NULL: dict[str, None] = dict.fromkeys(
    [
        "n", "max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "stop_token_ids", "ignore_eos",
        "min_tokens", "skip_special_tokens", "stream", "stream_options", "request_id", "user", "logprobs",
        "prompt_logprobs", "echo", "add_special_tokens", "best_of", "logit_bias", "suffix", "presence_penalty",
        "frequency_penalty", "repetition_penalty", "response_format", "priority", "tensor_parallel_size", "cache_salt",
    ]
)  # fmt: skip


def test_text_and_usage(client: openai.OpenAI) -> None:
    completion = client.completions.create(model=MODEL, prompt="hi", max_tokens=100)
    assert completion.object == "text_completion"
    assert completion.id.startswith("cmpl-")
    [choice] = completion.choices
    assert (choice.text, choice.index, choice.finish_reason) == (REPLY, 0, "stop")
    usage = completion.usage
    assert usage is not None
    tokens = len(REPLY.encode())
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (3, tokens, 3 + tokens)


def test_default_is_sixteen_tokens(client: openai.OpenAI) -> None:
    [choice] = client.completions.create(model=MODEL, prompt="@say " + "x" * 40).choices
    assert (choice.text, choice.finish_reason) == ("x" * 16, "length")


def test_model_may_be_left_out(http: httpx.Client) -> None:
    assert http.post("/v1/completions", json={"prompt": "hi"}).json()["model"] == MODEL


def test_explicit_nulls_mean_defaults(http: httpx.Client) -> None:
    answer = http.post("/v1/completions", json={"prompt": "hi", "model": None, **ALL_NULL})
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["text"] == REPLY.encode()[:16].decode(errors="replace")


def test_neutral_and_unknown_fields_are_accepted(http: httpx.Client) -> None:
    neutral = {"presence_penalty": 0, "repetition_penalty": 1.0, "best_of": 1, "logit_bias": {}, "suffix": ""}
    harmless = {"user": "me", "metadata": {"a": "b"}, "a_field_of_tomorrow": [1, {"\ud800": 2}], "\ud800": None}
    content = json.dumps({"prompt": "hi", **neutral, **harmless}).encode()
    answer = http.post("/v1/completions", content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == 200, answer.text


def test_prompts_times_n_have_the_right_indices(client: openai.OpenAI) -> None:
    prompts = ["@say one", "@say two", "@say three"]
    completion = client.completions.create(model=MODEL, prompt=prompts, n=2)
    texts = [(choice.index, choice.text) for choice in completion.choices]
    assert texts == [(0, "one"), (1, "one"), (2, "two"), (3, "two"), (4, "three"), (5, "three")]
    assert completion.usage is not None
    assert completion.usage.prompt_tokens == sum(1 + len(prompt) for prompt in prompts)
    assert completion.usage.completion_tokens == 2 * len("onetwothree")


@pytest.mark.parametrize("stream", [False, True])
def test_many_choices_streamed_and_whole_agree(client: openai.OpenAI, stream: bool) -> None:
    arguments = {"model": MODEL, "prompt": ["@say äöü", "@say 🌍🌎"], "n": 3}
    texts = [""] * 6
    if stream:
        for chunk in client.completions.create(**arguments, stream=True):  # type: ignore[call-overload]
            for choice in chunk.choices:
                texts[choice.index] += choice.text
    else:
        for choice in client.completions.create(**arguments).choices:  # type: ignore[call-overload]
            texts[choice.index] = choice.text
    assert texts == ["äöü"] * 3 + ["🌍🌎"] * 3


def test_seeds_of_choices_differ_and_are_derived(client: openai.OpenAI) -> None:
    seeded = client.completions.create(model=MODEL, prompt="@seed", n=3, seed=7)
    assert [choice.text for choice in seeded.choices] == ["seed=7", "seed=8", "seed=9"]
    unseeded = client.completions.create(model=MODEL, prompt="@seed", n=2)
    assert {choice.text for choice in unseeded.choices} == {"seed=None"}


def test_largest_seed_wraps(client: openai.OpenAI) -> None:
    completion = client.completions.create(model=MODEL, prompt="@seed", n=2, seed=2**63 - 1, max_tokens=40)
    assert [choice.text for choice in completion.choices] == [f"seed={2**63 - 1}", "seed=0"]


@pytest.mark.parametrize("prompt", [[104, 105], [[104, 105]]])
def test_token_ids_as_prompt(client: openai.OpenAI, prompt: list[int] | list[list[int]]) -> None:
    completion = client.completions.create(model=MODEL, prompt=prompt, max_tokens=100)
    assert completion.choices[0].text == REPLY
    assert completion.usage is not None
    assert completion.usage.prompt_tokens == 2


def test_mixed_lists_of_token_ids(client: openai.OpenAI) -> None:
    completion = client.completions.create(model=MODEL, prompt=[list(b"@say a"), list(b"@say b")])
    assert [choice.text for choice in completion.choices] == ["a", "b"]


def test_sampling_fields_reach_the_engine(http: httpx.Client, engine: ScriptedEngine) -> None:
    fields = {
        "temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "seed": 3, "max_tokens": 9, "min_tokens": 2,
        "ignore_eos": True, "skip_special_tokens": False, "stop_token_ids": [10], "logprobs": 2,
        "priority": -3, "tensor_parallel_size": 2,
    }  # fmt: skip
    body = {"prompt": "hi", "stop": ["@@", "##"], "request_id": "fields-test", **fields}
    answer = http.post("/v1/completions", json=body)
    assert answer.json()["id"] == "cmpl-fields-test"
    [params] = [params for name, params in engine.params.items() if name.startswith("cmpl-fields-test-")]
    expected = {**fields, "stop": ("@@", "##"), "stop_token_ids": (10,)}
    assert {name: getattr(params, name) for name in expected} == expected


def test_stop_string_and_reason(http: httpx.Client) -> None:
    [choice] = http.post("/v1/completions", json={"prompt": "@say one END two", "stop": "END"}).json()["choices"]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("one ", "stop", "END")


def test_logprobs(client: openai.OpenAI) -> None:
    [choice] = client.completions.create(model=MODEL, prompt="@say ab", logprobs=3).choices
    found = choice.logprobs
    assert found is not None
    assert found.tokens == ["a", "b"]
    assert found.token_logprobs == [token_logprob(ord("a")), token_logprob(ord("b"))]
    assert found.text_offset == [0, 1]
    first = found.top_logprobs[0]  # type: ignore[index]
    assert list(first) == ["a", "b", "c"]
    assert first["c"] == -9999.0


def test_zero_logprobs_is_the_token_itself(client: openai.OpenAI) -> None:
    [choice] = client.completions.create(model=MODEL, prompt="@say ab", logprobs=0).choices
    assert choice.logprobs is not None
    assert choice.logprobs.top_logprobs == [{"a": token_logprob(97)}, {"b": token_logprob(98)}]


@pytest.mark.parametrize("stream", [False, True])
def test_echo_with_logprobs_scores_the_prompt(http: httpx.Client, stream: bool) -> None:
    """What lm_eval's local-completions asks: token ids, echo, one token, log-probabilities of all."""
    prompt = [BOS, *b"@say yes"]
    body = {"prompt": [prompt], "echo": True, "logprobs": 1, "max_tokens": 1, "temperature": 0, "stream": stream}
    choices = _choices(http, body, stream)
    tokens = [token for choice in choices for token in choice["logprobs"]["tokens"]]
    logprobs = [value for choice in choices for value in choice["logprobs"]["token_logprobs"]]
    tops = [value for choice in choices for value in choice["logprobs"]["top_logprobs"]]
    offsets = [value for choice in choices for value in choice["logprobs"]["text_offset"]]
    assert "".join(choice["text"] for choice in choices) == "@say yesy"
    assert tokens == ["<s>", *"@say yesy"]
    assert logprobs == [None, *map(prompt_logprob, prompt[1:]), token_logprob(ord("y"))]
    assert tops[0] is None
    # Real alternatives: lm_eval takes a token for greedy where its own log-probability is the greatest here.
    assert tops[1:-1] == [{"!": -0.125, token: prompt_logprob(ord(token))} for token in "@say yes"]
    assert offsets == [0, *range(9)]  # <s> is not in the text


@pytest.mark.parametrize(("stream", "echo"), [(False, False), (False, True), (True, False), (True, True)])
def test_offsets_are_places_in_the_text(http: httpx.Client, stream: bool, echo: bool) -> None:
    body = {"prompt": "@say aé😀b", "logprobs": 0, "echo": echo, "max_tokens": 40, "stream": stream}
    choices = _choices(http, body, stream)
    text = "".join(choice["text"] for choice in choices)
    offsets = [value for choice in choices for value in choice["logprobs"]["text_offset"]]
    answer = [0, 1, 1, 2, 2, 2, 2, 3]
    prompt = [0, *range(5), *(5 + place for place in answer)] if echo else []
    assert offsets == prompt + [len(text) - 4 + place for place in answer]


def test_an_empty_prompt_is_bos_where_the_tokenizer_adds_one(http: httpx.Client) -> None:
    for prompt in ("", [""]):
        answer = http.post("/v1/completions", json={"prompt": prompt, "echo": True, "max_tokens": 99})
        assert answer.json()["choices"][0]["text"] == REPLY
        assert answer.json()["usage"]["prompt_tokens"] == 1
    assert http.post("/tokenize", json={"prompt": ""}).json()["tokens"] == [BOS]


def test_an_empty_prompt_without_bos_is_refused(http: httpx.Client) -> None:
    answer = http.post("/v1/completions", json={"prompt": "", "add_special_tokens": False})
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == "prompt must not be empty: it has no tokens"


@pytest.mark.parametrize("stream", [False, True])
def test_echo_of_nothing_but_the_prompt(http: httpx.Client, stream: bool) -> None:
    body = {"prompt": "äh", "echo": True, "max_tokens": 0, "stream": stream}
    choices = _choices(http, body, stream)
    assert "".join(choice["text"] for choice in choices) == "äh"
    assert choices[-1]["finish_reason"] == "length"
    if not stream:
        assert http.post("/v1/completions", json=body).json()["usage"]["completion_tokens"] == 0


def test_prompt_logprobs_field(http: httpx.Client) -> None:
    [choice] = http.post("/v1/completions", json={"prompt": "a!", "prompt_logprobs": 0}).json()["choices"]
    assert choice["prompt_logprobs"] == [
        None,
        {"97": {"logprob": prompt_logprob(97), "rank": 3, "decoded_token": "a"}},
        {"33": {"logprob": prompt_logprob(33), "rank": 3, "decoded_token": "!"}},
    ]


def test_prompt_logprobs_with_alternatives_have_vllms_form(http: httpx.Client) -> None:
    body = {"prompt": "a!", "prompt_logprobs": 2, "echo": True, "logprobs": 1}
    [choice] = http.post("/v1/completions", json=body).json()["choices"]
    best, second = ({"logprob": value, "rank": rank} for value, rank in ((-0.125, 1), (-0.25, 2)))
    first, last = choice["prompt_logprobs"][1:]
    assert list(first.items()) == [
        ("97", {"logprob": prompt_logprob(97), "rank": 3, "decoded_token": "a"}),
        ("33", {**best, "decoded_token": "!"}),
        ("63", {**second, "decoded_token": "?"}),
    ]
    assert last == {"33": {**best, "decoded_token": "!"}, "63": {**second, "decoded_token": "?"}}
    assert [len(top) for top in choice["logprobs"]["top_logprobs"][1:3]] == [2, 1]  # logprobs' own count


def test_prompt_logprobs_cannot_be_streamed(http: httpx.Client) -> None:
    answer = http.post("/v1/completions", json={"prompt": "a", "prompt_logprobs": 1, "stream": True})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "prompt_logprobs")


def test_tokens_of_the_same_text_have_distinct_keys(http: httpx.Client) -> None:
    """Bytes of a character all look like U+FFFD: the token's own has that key, its twins those of their ids."""
    body = {"prompt": "@say ä", "logprobs": 3, "max_tokens": 1}
    [choice] = http.post("/v1/completions", json=body).json()["choices"]
    found = choice["logprobs"]
    assert found["tokens"] == ["\ufffd"]
    own = token_logprob(0xC3)
    assert found["top_logprobs"] == [{"\ufffd": own, "token_id:196": own - 1, "token_id:197": -9999.0}]


def test_tokens_as_token_ids(http: httpx.Client) -> None:
    body = {"prompt": "@say ab", "logprobs": 2, "return_tokens_as_token_ids": True}
    [choice] = http.post("/v1/completions", json=body).json()["choices"]
    found = choice["logprobs"]
    assert found["tokens"] == ["token_id:97", "token_id:98"]
    assert list(found["top_logprobs"][0]) == ["token_id:97", "token_id:98"]
    assert found["text_offset"] == [0, 1]


def test_a_prompt_without_special_tokens(http: httpx.Client) -> None:
    answer = http.post("/v1/completions", json={"prompt": "hi", "add_special_tokens": False})
    assert answer.json()["usage"]["prompt_tokens"] == 2


def test_cached_tokens_are_counted_once_a_prompt(http: httpx.Client) -> None:
    answer = http.post("/v1/completions", json={"prompt": ["a", "b"], "n": 2})
    assert answer.json()["usage"]["prompt_tokens_details"] == {"cached_tokens": 2}


def _choices(http: httpx.Client, body: dict[str, Any], stream: bool) -> list[dict[str, Any]]:
    answer = http.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    if not stream:
        choices: list[dict[str, Any]] = answer.json()["choices"]
        return choices
    lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
    return [choice for line in lines[:-1] for choice in json.loads(line)["choices"]]


@pytest.mark.parametrize(
    "extra", [{"seed": -1}, {"stream_options": {}}, {"stream_options": None}, {"stop": ["a"] * 64}]
)
def test_fields_that_ask_for_nothing_are_taken_as_vllm_takes_them(http: httpx.Client, extra: dict[str, Any]) -> None:
    answer = http.post("/v1/completions", json={"prompt": "@seed", **extra})
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["text"] == "seed=None"
