"""The engine on the kernels, interpreted: the same log-probabilities as on plain JAX, across live switches."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import pytest

import kernels_pallas
from fly_jax import config
from fly_jax.engine.loader import load_model
from fly_jax.engine.plan import plan_engine
from fly_jax.errors import ConfigError
from fly_jax.sampling_params import SamplingParams
from tests.support import migrated_through, small_config
from tests.tiny_models import CASES, random_token_ids, write_model

PROMPTS = {f"r{length}": random_token_ids(length, 256, seed=length) for length in (3, 17, 60)}
PARAMS = SamplingParams(max_tokens=18, temperature=0.0, ignore_eos=True, logprobs=0, prompt_logprobs=0)


def log_probabilities(folder: Path, attention_backend: str, layouts: Sequence[str]) -> dict[str, np.ndarray]:
    """Of every prompt and generated token, where the layout changes every few steps."""
    options = {"devices": 2, "num_blocks": 64, "max_num_batched_tokens": 64, "layout": layouts[0]}
    engine = load_model(small_config(folder, attention_backend=attention_backend, **options)).engine()
    for name, prompt in PROMPTS.items():
        engine.add_request(name, prompt, PARAMS)
    found = migrated_through(engine, layouts[1:], every=4)
    assert engine.stats().compiles_after_warmup == 0
    return {name: np.array([token.logprob for token in tokens]) for name, tokens in found.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    write_model(folder, CASES["qwen3_layer_types"])  # layers with and without a window
    return folder


@pytest.mark.slow
def test_kernels_give_the_log_probabilities_of_plain_jax_across_switches(folder: Path) -> None:
    expected = log_probabilities(folder, "xla", ["1+1"])
    result = log_probabilities(folder, "pallas", ["1+1", "2", "1+1"])
    assert set(result) == set(expected) == set(PROMPTS)
    for name, values in expected.items():
        assert len(values) == len(PROMPTS[name]) - 1 + PARAMS.max_tokens
        np.testing.assert_allclose(result[name], values, atol=2e-4)


def test_auto_takes_plain_jax_where_there_is_no_gpu(folder: Path) -> None:
    plan = plan_engine(small_config(folder))
    assert plan.shapes.attention_backend == ("xla" if jax.default_backend() == "cpu" else "pallas")
    assert plan_engine(small_config(folder, attention_backend="pallas")).shapes.attention_backend == "pallas"


def test_an_unknown_backend_is_refused_by_the_option_and_by_the_function(folder: Path) -> None:
    with pytest.raises(ConfigError, match="attention_backend must be one of auto, xla, pallas, got 'triton'"):
        small_config(folder, attention_backend="triton")
    with pytest.raises(ValueError, match="attention backend 'triton' is none of xla, pallas"):
        kernels_pallas.attention_backend("triton", jax.devices()[0])


def test_the_options_offer_every_backend_there_is() -> None:
    assert ("auto", *kernels_pallas.BACKENDS) == config.ATTENTION_BACKENDS
