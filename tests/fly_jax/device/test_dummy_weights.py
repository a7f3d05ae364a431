"""``--load-format dummy``: an engine from ``config.json`` alone."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fly_jax.bench.__main__ import parse
from fly_jax.cli.main import main
from fly_jax.device.dummy_weights import draw_resident
from fly_jax.device.meshes import DeviceMeshes
from fly_jax.errors import CheckpointError
from fly_jax.models.config import ModelConfig
from fly_jax.models.sharding import model_spec
from fly_jax.sampling_params import SamplingParams
from fly_jax.text.tokenizer import placeholder_tokenizer
from tests.support import small_llm

# Two KV heads among four devices: each has a copy of one.
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip
PROMPT = tuple(range(3, 60))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_it_is_one_model_in_every_layout_and_at_every_base_degree(folder: Path, kv_heads: int) -> None:
    (folder / "config.json").write_text(json.dumps(CONFIG | {"num_key_value_heads": kv_heads}))
    with small_llm(folder, load_format="dummy", layout="1+1+2", layouts=("4",)) as llm:
        narrow = llm.score(PROMPT)
        llm.switch("4")
        wide = llm.score(PROMPT)
    with small_llm(folder, load_format="dummy", base_tp=2, layouts=("2+2",)) as llm:
        by_halves = llm.score(PROMPT)
    np.testing.assert_allclose(wide, narrow, atol=1e-5)
    np.testing.assert_allclose(by_halves, narrow, atol=1e-5)
    assert narrow.std() > 1e-3, "every token is as likely as any other"


@pytest.mark.slow
@pytest.mark.parametrize("base_tp", [1, 2])
def test_replicas_on_cpu_devices_are_one_copy(base_tp: int) -> None:
    spec = model_spec(ModelConfig.from_hf(CONFIG), 4, jnp.dtype("bfloat16"))
    meshes = DeviceMeshes(jax.devices()[:4], base_tp)
    told: list[tuple[int, int]] = []
    resident = draw_resident(spec, meshes, 0, lambda done, total: told.append((done, total)))
    for name in spec.buffers:
        arrays = [buffers[name] for buffers in resident]
        assert [array.devices() for array in arrays] == [{device} for device in meshes.devices]
        assert len({array.unsafe_buffer_pointer() for array in arrays}) == base_tp
    assert told[-1][0] == told[-1][1]


@pytest.mark.slow
def test_text_goes_in_and_comes_out_without_a_tokenizer(folder: Path) -> None:
    with small_llm(folder, load_format="dummy", layouts=("4",)) as llm:
        (output,) = llm.generate("Grüße", SamplingParams(max_tokens=9, ignore_eos=True))
    assert len(output.prompt_token_ids) == len("Grüße".encode())
    assert len(output.token_ids) == 9


def test_bytes_and_words_of_the_placeholder_are_read_back() -> None:
    tokenizer = placeholder_tokenizer(300)
    assert tokenizer.decode(tokenizer.encode("Grüße 👋\n")) == "Grüße 👋\n"
    assert tokenizer.decode([256, 299]) == " t256 t299"
    with pytest.raises(CheckpointError, match="vocab_size 255 is less than the 256 bytes"):
        placeholder_tokenizer(255)


def test_without_the_option_weights_are_needed(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no model.safetensors or model"):
        small_llm(folder)


@pytest.mark.slow
def test_the_command_line_has_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--load-format", "dummy", "--layouts", "4", "--devices", "4", "--max-num-seqs", "4", "--quiet"]
    assert main(["generate", str(folder), *options, "--prompt", "a", "--max-tokens", "2"]) == 0
    assert capsys.readouterr().out.startswith("a")


@pytest.mark.parametrize("command", ["throughput", "latency", "switch", "serve", "sweep"])
def test_every_benchmark_of_a_model_has_it(command: str) -> None:
    assert parse([command, "--load-format", "dummy"]).load_format == "dummy"
