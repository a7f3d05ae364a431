"""Every family and option against golden values of Hugging Face transformers, at TP 1, 2, 4 and mixed widths."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fly_jax import SamplingParams
from fly_jax.engine.loader import make_runner
from fly_jax.engine.plan import plan_engine
from fly_jax.layout import DeviceGroup
from fly_jax.scheduling.launch import StepKind
from tests.golden import golden_cases, load_golden
from tests.support import score_on_group, small_config, small_llm
from tests.tiny_models import CASES, write_model

TOLERANCE = 2e-4
GROUPS = (DeviceGroup(0, 1), DeviceGroup(2, 2), DeviceGroup(0, 4))
LAYOUTS = ("2+1+1", "4")
# At least one of every family and of every way in which heads, FFN or vocabulary do not divide.
WHOLE_ENGINE_CASES = (
    "llama_gqa_tied", "llama_rope_dynamic", "llama_heads_5_kv_5", "llama_heads_8_kv_1", "mistral_window", "qwen2",
    "qwen3", "llama_vocab_323_tied",
)  # fmt: skip
GREEDY = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
SCORE = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True, prompt_logprobs=0)


def nothing(phase: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


@pytest.mark.slow
@pytest.mark.parametrize("case", golden_cases())
def test_log_probabilities_agree_with_transformers_at_every_degree(case: str, tmp_path: Path) -> None:
    write_model(tmp_path, CASES[case])
    plan = plan_engine(small_config(tmp_path))
    kinds = (StepKind.MIXED, StepKind.SCORE)
    keys = [key for group in GROUPS for key in plan.shapes.keys(group) if key.kind in kinds]
    runner = make_runner(plan, keys, nothing)
    for group in GROUPS:
        for prompt in load_golden(case).prompts:
            scores = score_on_group(runner, group, prompt.token_ids)
            np.testing.assert_allclose(scores, prompt.logprobs, atol=TOLERANCE, rtol=0, err_msg=str(group))


@pytest.mark.slow
@pytest.mark.parametrize("case", WHOLE_ENGINE_CASES)
def test_the_whole_engine_agrees_with_transformers_in_mixed_and_uniform_layouts(case: str, tmp_path: Path) -> None:
    golden = load_golden(case)
    write_model(tmp_path, CASES[case])
    with small_llm(tmp_path, layouts=LAYOUTS) as llm:
        for layout in LAYOUTS:
            llm.switch(layout)
            # More requests than groups, so that a mixed layout runs some of them at each of its widths.
            prompts = [prompt for prompt in golden.prompts for _ in layout.split("+")]
            outputs = llm.generate([prompt.token_ids for prompt in prompts], SCORE)
            for prompt, output in zip(prompts, outputs, strict=True):
                assert output.prompt_logprobs is not None
                np.testing.assert_allclose(output.prompt_logprobs.logprobs, prompt.logprobs, atol=TOLERANCE, rtol=0)
            for output in llm.generate([golden.prompts[0].token_ids] * 3, GREEDY):
                assert output.token_ids == tuple(golden.greedy)


@pytest.mark.parity
@pytest.mark.parametrize("case", golden_cases())
def test_live_transformers_agree(case: str, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from tests.golden.parity import live_logprobs

    write_model(tmp_path, CASES[case], seed=1)
    token_ids = load_golden(case).prompts[-1].token_ids
    expected = live_logprobs(tmp_path, token_ids)
    with small_llm(tmp_path, layouts=LAYOUTS) as llm:
        for layout in LAYOUTS:
            llm.switch(layout)
            np.testing.assert_allclose(llm.score(token_ids), expected, atol=TOLERANCE, rtol=0)
