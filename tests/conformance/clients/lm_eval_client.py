"""lm_eval's ``local-completions`` on a task whose right scores are known.

Of the eight targets of ``recall.jsonl`` six are what the model says next and two are nonsense: so say the
log-probabilities in it, which are those of transformers in float32; its own in bfloat16 differ by up to 0.1 and 1
percent. The task with log-likelihoods scores whether a target is the model's own greedy choice, and so needs
alternatives of prompt tokens.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import lm_eval
from checks import MODEL, expect, server_url
from lm_eval.tasks import TaskManager

HERE = Path(__file__).parent
DEMO_MODEL = HERE.parents[2] / "checkpoints" / "demo" / "model"
SHARED = f"""
dataset_path: json
dataset_kwargs: {{data_files: {{test: {HERE / "recall.jsonl"}}}}}
test_split: test
doc_to_text: "{{{{prompt}}}}"
"""
TASKS = {
    "recall_greedy": """
output_type: loglikelihood
doc_to_target: "{{target}}"
target_delimiter: ""
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
    "recall_choice": """
output_type: multiple_choice
doc_to_choice: "{{[first, second]}}"
doc_to_target: 0
target_delimiter: ""
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
    "recall_generated": """
output_type: generate_until
doc_to_target: "{{target}}"
generation_kwargs: {until: ["<|eos|>", "\\n"], temperature: 0, max_gen_toks: 16}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
}
KNOWN = 0.75  # six of eight, in each task


def evaluate(folder: str, *, add_bos: bool) -> dict[str, Any]:
    return lm_eval.simple_evaluate(
        model="local-completions",
        model_args={
            "model": MODEL,
            "base_url": f"{server_url()}/v1/completions",
            "tokenizer": str(DEMO_MODEL),
            "tokenizer_backend": "huggingface",
            "add_bos_token": add_bos,
            "max_retries": 1,
            "num_concurrent": 2,
        },
        tasks=list(TASKS),
        task_manager=TaskManager(include_path=folder, include_defaults=False),
        bootstrap_iters=0,
    )


def check(results: dict[str, Any], reference: str) -> None:
    """The known scores, and log-probabilities within 0.25 or 2 percent of that field of ``recall.jsonl``."""
    for name in TASKS:
        scores = results["results"][name].items()
        [score] = [value for metric, value in scores if metric.endswith(",none") and "stderr" not in metric]
        expect(name, score, KNOWN)
    for sample in results["samples"]["recall_greedy"]:
        [[logprob, _]], wanted = sample["filtered_resps"], sample["doc"][reference]
        if abs(logprob - wanted) > max(0.25, 0.02 * abs(wanted)):
            raise SystemExit(f"{reference} of {sample['target']!r}: expected {wanted}, got {logprob}")


with tempfile.TemporaryDirectory() as folder:
    for name, task in TASKS.items():
        (Path(folder) / f"{name}.yaml").write_text(f"task: {name}\n{SHARED}{task}")
    check(evaluate(folder, add_bos=False), "logprob")
    check(evaluate(folder, add_bos=True), "logprob_after_bos")
