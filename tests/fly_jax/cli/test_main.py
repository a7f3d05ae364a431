"""The command line: what works, and that what does not is one clear line and exit code 2."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace, TracebackType
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fly_jax.async_engine import AsyncEngine
from fly_jax.cli.main import main
from fly_jax.config import EngineConfig
from fly_jax.errors import EngineDeadError
from fly_jax.outputs import SwitchStrategy
from fly_jax.sampling_params import SamplingParams
from serving import ServerOptions
from tests.fly_jax.tokenizer_families import llama_2
from tests.tiny_models import CASES, write_model

ONE_DEVICE = ["--devices", "1", "--layouts", "1"]
TINY = ["--max-num-seqs", "2", "--max-num-batched-tokens", "64", "--layouts", "2+2", "-O", "0"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    write_model(path, CASES["llama_gqa_tied"])
    return path


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1, captured.err
    return lines[0]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["serve", "/no/such/folder"], "/no/such/folder does not exist"),
        (["generate", "/no/such/folder", "--prompt", "x"], "/no/such/folder does not exist"),
        (["convert", "/no/such/folder", "/tmp/never"], "/no/such/folder"),
        (["demo", "--url", "http://127.0.0.1:9"], "--url"),
    ],
)
def test_a_missing_folder_or_server_is_one_line(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--port", "0"] if arguments[0] == "serve" else arguments) == 2
    assert says in error_line(capsys)


@pytest.mark.parametrize(
    "arguments", [["sreve"], ["serve"], ["serve", "x", "--layuot", "2+2"], ["serve", "x", "--port", "p"]]
)
def test_a_typo_is_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "--help" in error_line(capsys)


def test_a_layout_that_does_not_fit_is_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(folder), "--prompt", "x", "--devices", "4", "--layout", "3+1"]) == 2
    assert "power of two" in error_line(capsys)


def test_a_missing_tokenizer_is_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "tokenizer.json").unlink()
    assert main(["generate", str(folder), "--prompt", "x"]) == 2
    assert "tokenizer.json is missing" in error_line(capsys)


def test_weights_that_do_not_match_the_config_are_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 64}))
    assert main(["generate", str(folder), "--prompt", "x", "--layouts", "4"]) == 2
    assert "mlp" in error_line(capsys)


def test_a_truncated_file_is_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert main(["generate", str(folder), "--prompt", "x", "--layouts", "4"]) == 2
    assert "model.safetensors" in error_line(capsys)


def test_a_model_too_large_is_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(folder), "--prompt", "x", "--device-memory-bytes", "1000"]) == 2
    assert "a device has 1,000" in error_line(capsys)


def test_a_port_in_use_is_one_line_before_anything_is_loaded(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main(["serve", str(folder), "--port", port]) == 2
    assert f"port {port}" in error_line(capsys)


@pytest.mark.slow
def test_a_converted_folder_generates_the_same_text(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepared = tmp_path / "prepared"
    assert main(["convert", str(folder), str(prepared), "--max-tp", "4", "--quiet"]) == 0
    texts = []
    for model in (folder, prepared):
        capsys.readouterr()
        assert main(["generate", str(model), "--prompt", "hello", "--max-tokens", "8", "--quiet", *TINY]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert texts[0].startswith("hello")


@pytest.mark.slow
def test_the_answer_goes_on_from_the_prompt_with_its_space(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The head can only give one of two words, whose tokens begin with a space, as in Llama 2."""
    tokenizer = llama_2()
    write_model(tmp_path, CASES["llama_mha"] | {"vocab_size": tokenizer.get_vocab_size()})
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    weights = load_file(tmp_path / "model.safetensors")
    head = np.zeros_like(weights["lm_head.weight"])
    words = {tokenizer.token_to_id("▁time"): " time", tokenizer.token_to_id("▁cat"): " cat"}
    head[list(words)] = np.stack([np.ones(head.shape[1]), -np.ones(head.shape[1])])
    save_file(weights | {"lm_head.weight": head}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    prompts = ["Once upon a", "the 漢字"]
    options = [option for prompt in prompts for option in ("--prompt", prompt)]
    assert main(["generate", str(tmp_path), *options, "--max-tokens", "2", "--quiet", *TINY, *ONE_DEVICE]) == 0
    answers = {first + second for first in words.values() for second in words.values()}
    for prompt, line in zip(prompts, capsys.readouterr().out.splitlines(), strict=True):
        assert line.startswith(prompt)
        assert line[len(prompt) :] in answers


@pytest.mark.parametrize("name", ["api", "admin"])
def test_an_empty_key_starts_no_open_server(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(f"FLY_JAX_{name.upper()}_KEY", "a key that the option overrides")
    assert main(["serve", str(folder), "--port", "0", f"--{name}-key", ""]) == 2
    assert f"--{name}-key is empty: give a key" in error_line(capsys)
    monkeypatch.setenv(f"FLY_JAX_{name.upper()}_KEY", "")
    assert main(["serve", str(folder), "--port", "0"]) == 2
    assert f"$FLY_JAX_{name.upper()}_KEY is empty: give a key" in error_line(capsys)


def test_an_empty_admin_key_is_refused_by_the_demo_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--url", "http://127.0.0.1:9", "--admin-key", ""]) == 2
    assert "--admin-key is empty" in error_line(capsys)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--layout", "4", "-tp", "1"], "--layout 4 and --tensor-parallel-size 1 both name the first layout"),
        (["--layout", "4", "-dp", "4"], "--layout 4 and --data-parallel-size 4 both name the first layout"),
        (["-tp", "0"], "--tensor-parallel-size must be at least 1, got 0"),
        (["-tp", "-2"], "--tensor-parallel-size must be at least 1, got -2"),
        (["-tp", "2", "-dp", "0"], "--data-parallel-size must be at least 1, got 0"),
    ],
)
def test_layout_options_that_cannot_be_followed_are_one_line(
    arguments: list[str], says: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", str(folder), "--prompt", "x", *arguments]) == 2
    assert says in error_line(capsys)


def test_a_folder_that_cannot_be_written_is_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    target = tmp_path / "file" / "prepared"
    assert main(["convert", str(folder), str(target), "--max-tp", "4", "--quiet"]) == 2
    assert f"{target} cannot be written" in error_line(capsys)


@pytest.mark.parametrize(
    ("variable", "value"), [("NPROC", "abc"), ("XLA_FLAGS", "--xla_force_host_platform_device_count=x")]
)
def test_an_environment_variable_that_is_no_number_is_one_line(
    variable: str, value: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(variable, value)
    assert main(["generate", str(folder), "--prompt", "x"]) == 2
    line = error_line(capsys)
    assert variable in line
    assert "must be a whole number" in line


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], {"layout": None, "policy": "auto", "switch_strategy": "migrate", "scheduling_policy": "fcfs"}),
        (["--layout", "2+2", "--policy", "static"], {"layout": "2+2", "policy": "static"}),
        (["--policy", "load_adaptive"], {"policy": "load_adaptive"}),
        (["--switch-strategy", "hard_preempt"], {"switch_strategy": "hard_preempt"}),
        (["--scheduling-policy", "priority"], {"scheduling_policy": "priority"}),
        ([], {"max_queued_per_client": None, "queued_per_client": 512, "allow_request_width": True}),
        (
            ["--max-queued-per-client", "3", "--no-allow-request-width"],
            {"queued_per_client": 3, "allow_request_width": False},
        ),
        (["--allow-request-width", "--engine-timeout", "2.5"], {"allow_request_width": True, "engine_timeout": 2.5}),
    ],
)
def test_options_of_layouts_and_order_reach_the_engine(
    arguments: list[str], expected: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs: list[EngineConfig] = []
    monkeypatch.setattr(AsyncEngine, "from_config", lambda config, _progress: configs.append(config))
    monkeypatch.setattr("serving.run", _only_start)
    monkeypatch.setattr("fly_jax.llm.LLM", lambda **options: NoLLM(configs, options))
    assert main(["serve", str(folder), *arguments]) == 0
    assert main(["generate", str(folder), "--prompt", "x", "--quiet", *arguments]) == 0
    for config in configs:
        assert {name: getattr(config, name) for name in expected} == expected
        assert isinstance(config.switch_strategy, SwitchStrategy)
    assert len(configs) == 2


def _only_start(start_engine: Callable[[], object], _options: object) -> None:
    start_engine()


class NoLLM:
    """Notes its options and generates nothing."""

    def __init__(self, configs: list[EngineConfig], options: dict[str, Any]) -> None:
        configs.append(EngineConfig(**{name: value for name, value in options.items() if name != "progress"}))

    def __enter__(self) -> NoLLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        pass

    def get_default_sampling_params(self) -> SamplingParams:
        return SamplingParams(top_k=20, top_p=0.8)

    def generate(self, prompts: object, params: SamplingParams) -> list[object]:  # noqa: ARG002  the shape of LLM's
        return []


class Answering(NoLLM):
    """Gives each prompt the answer that it is the key of; the latest parameters are kept."""

    params: SamplingParams

    def generate(self, prompts: object, params: SamplingParams) -> list[object]:
        type(self).params = params
        assert isinstance(prompts, list)
        return [SimpleNamespace(prompt=text, text=" time", error={"bad": "NaN"}.get(text)) for text in prompts]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], SamplingParams(max_tokens=128, temperature=0.0, top_k=20, top_p=0.8)),
        (
            ["--temperature", "0.5", "--top-p", "1", "--max-tokens", "3", "--request-seed", "4"],
            SamplingParams(max_tokens=3, temperature=0.5, top_k=20, seed=4),
        ),
    ],
)
def test_generate_samples_as_the_model_recommends_unless_told(
    arguments: list[str], expected: SamplingParams, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fly_jax.llm.LLM", lambda **options: Answering([], options))
    assert main(["generate", str(folder), "--prompt", "a", *arguments]) == 0
    assert Answering.params == expected


def test_a_prompt_that_fails_is_an_error_and_the_others_are_written(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fly_jax.llm.LLM", lambda **options: Answering([], options))
    assert main(["generate", str(folder), "--prompt", "bad", "--prompt", "Once upon a"]) == 1
    captured = capsys.readouterr()
    assert captured.out.splitlines() == ["bad time", "Once upon a time"]
    assert captured.err == "fly-jax: error: NaN\n"


@pytest.mark.parametrize(
    ("command", "option", "choices"),
    [
        ("serve", "--policy", ("auto", "load_adaptive", "static")),
        ("generate", "--policy", ("auto", "load_adaptive", "static")),
        ("serve", "--switch-strategy", tuple(SwitchStrategy)),
        ("demo", "--switch-strategy", tuple(SwitchStrategy)),
        ("generate", "--scheduling-policy", ("fcfs", "priority")),
    ],
)
def test_an_unknown_choice_is_one_line_with_those_there_are(
    command: str, option: str, choices: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, *(["x"] if command != "demo" else []), option, "wrong"])
    assert ended.value.code == 2
    line = error_line(capsys)
    assert option in line
    assert all(choice in line for choice in choices)


def test_the_help_says_how_to_pin_a_layout(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    assert "'--layout 2+2 --policy static' pins a layout" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    "says",
    [
        "requests running at once in a group (default: 32)",
        "tokens in one step of a group (default: 512)",
        "requests waiting before 503 (default: 1024)",
        "tokens a KV block holds at TP 1 (default: 16)",
        "fraction for weights and KV (default: 0.9)",
        "seconds that open requests get to end (default: 10)",
        "compile only these, by commas, and the first layout (default: all)",
        "until their group is back, the groups in its place are idle, or they have waited long",
    ],
)
def test_the_help_states_the_defaults(says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    assert says in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("command", [[], ["serve"], ["generate"], ["convert"], ["demo"]])
def test_help_starts_no_jax(command: list[str]) -> None:
    program = (
        "import sys; from fly_jax.cli.main import main\n"
        f"try: main({[*command, '--help']!r})\n"
        "finally: assert 'jax' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "usage: fly-jax" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "names", "origins"),
    [
        ([], (), ()),
        (["--served-model-name", "a", "b"], ("a", "b"), ()),
        (
            ["--allowed-origins", '["https://a.example", "https://b.example"]'],
            (),
            ("https://a.example", "https://b.example"),
        ),
        (["--allowed-origins", "*"], (), ("*",)),
    ],
)
def test_names_and_origins_reach_the_server(
    arguments: list[str],
    names: tuple[str, ...],
    origins: tuple[str, ...],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given: list[ServerOptions] = []
    monkeypatch.setattr("serving.run", lambda _start, options: given.append(options))
    assert main(["serve", str(folder), *arguments]) == 0
    assert [(options.served_model_names, options.allowed_origins) for options in given] == [(names, origins)]


@pytest.mark.parametrize(
    ("arguments", "keys"),
    [
        ([], ("of the environment",)),
        (["--api-key", "a"], ("a",)),
        (["--api-key", "a", "b"], ("a", "b")),
        (["--api-key", "a", "--api-key", "b"], ("a", "b")),
    ],
)
def test_keys_reach_the_server(
    arguments: list[str], keys: tuple[str, ...], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[ServerOptions] = []
    monkeypatch.setenv("FLY_JAX_API_KEY", "of the environment")
    monkeypatch.setattr("serving.run", lambda _start, options: given.append(options))
    assert main(["serve", str(folder), *arguments]) == 0
    assert [options.api_keys for options in given] == [keys]


@pytest.mark.parametrize(
    "origins", ["[1]", "[", '["a"', "example.com", "https://a.example/", '["https://a.example/x"]']
)
def test_what_no_browser_sends_as_an_origin_is_one_line(origins: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["serve", "x", "--allowed-origins", origins])
    assert "--allowed-origins" in error_line(capsys)


def test_a_server_whose_engine_has_failed_ends_with_another_code_than_a_wrong_option(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_start_engine: object, _options: object) -> None:
        raise EngineDeadError("the engine has failed")

    monkeypatch.setattr("serving.run", fail)
    assert main(["serve", str(folder)]) == 1
    assert error_line(capsys) == "fly-jax: error: the engine has failed"
