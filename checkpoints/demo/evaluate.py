"""Measures a demo model on unseen prompts: `python -m checkpoints.demo.evaluate MODEL_DIR`.

Prints the recall accuracy by prompt form and length, the accuracy on questions about stories, and
two stories. An answer counts only if greedy decoding gives exactly its tokens and then eos.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jinja2 import Template
from tokenizers import Tokenizer

from checkpoints.demo import text
from checkpoints.demo.plain_llama import LlamaConfig, forward, load_model
from checkpoints.demo.tokenizer import ASSISTANT, BOS, EOS, PAD

FACT_COUNTS = (5, 40, 80, 120, 160)
BATCH_SIZE = 10
STORY_TOKENS = 160


@dataclass(frozen=True)
class Example:
    """Token ids of a prompt and of the one right continuation, eos included."""

    prompt: list[int]
    answer: list[int]


@dataclass(frozen=True)
class Model:
    """A loaded model folder."""

    config: LlamaConfig
    weights: dict[str, Array]
    tokenizer: Tokenizer
    chat_template: Template

    @classmethod
    def load(cls, model_dir: Path, dtype: jnp.dtype) -> Model:
        """Loads a model folder; dtype is the type of computation."""
        config, weights = load_model(model_dir)
        tokenizer_config = json.loads((model_dir / "tokenizer_config.json").read_text())
        return cls(
            config=config,
            weights={name: weight.astype(dtype) for name, weight in weights.items()},
            tokenizer=Tokenizer.from_file(str(model_dir / "tokenizer.json")),
            chat_template=Template(tokenizer_config["chat_template"]),
        )

    def encode(self, full_text: str) -> list[int]:
        """Ids of a text that spells out its special tokens."""
        return self.tokenizer.encode(full_text, add_special_tokens=False).ids

    def example(self, prompt: str, answer: str) -> Example:
        """The raw completion form: the answer follows after a space."""
        return Example(self.encode(BOS + prompt), self.encode(" " + answer + EOS))

    def chat_example(self, content: str, answer: str) -> Example:
        """The chat form: the assistant's message is the answer."""
        rendered = self.chat_template.render(
            messages=[{"role": "user", "content": content}],
            bos_token=BOS,
            eos_token=EOS,
            add_generation_prompt=True,
        )
        return Example(self.encode(rendered), self.encode(answer + EOS))


@partial(jax.jit, static_argnums=1)
def greedy_tokens(weights: dict[str, Array], config: LlamaConfig, tokens: Array) -> Array:
    """The likeliest next token after every position: [B, T] for tokens [B, T]."""
    return forward(weights, config, tokens).argmax(-1)


def accuracy(model: Model, examples: list[Example]) -> float:
    """The share of examples whose greedy continuation is the answer.

    One forward pass over prompt and answer tells: greedy decoding gives the answer if and only if
    every token of it is the likeliest after those before it. Rows are padded at the end, which a
    causal model does not see, to a multiple of 64, which saves compilations.
    """
    longest = max(len(example.prompt) + len(example.answer) for example in examples)
    tokens = np.zeros((len(examples), -(-longest // 64) * 64), np.int32)
    for row, example in enumerate(examples):
        ids = example.prompt + example.answer
        tokens[row, : len(ids)] = ids
    correct = 0
    for start in range(0, len(examples), BATCH_SIZE):
        rows = slice(start, start + BATCH_SIZE)
        predictions = np.asarray(greedy_tokens(model.weights, model.config, tokens[rows]))
        for example, predicted in zip(examples[rows], predictions, strict=True):
            first = len(example.prompt) - 1
            correct += predicted[first : first + len(example.answer)].tolist() == example.answer
    return correct / len(examples)


def recall_examples(model: Model, num_facts: int, count: int, chat: bool) -> list[Example]:
    """Recall tasks of the evaluation seeds in one form."""
    tasks = [text.recall_prompt(f"evaluate/{num_facts}/{seed}", num_facts) for seed in range(count)]
    if chat:
        return [model.chat_example(task.messages[0]["content"], task.answer) for task in tasks]
    return [model.example(task.prompt, task.answer) for task in tasks]


def story_examples(model: Model, count: int, chat: bool) -> list[Example]:
    """Stories, each with a question, in one form."""
    examples = []
    for seed in range(count):
        tale, question, answer = text.story_question(f"evaluate/{seed}")
        if chat:
            examples.append(model.chat_example(f"{tale.text}\n{question}", answer))
        else:
            examples.append(model.example(f"{tale.text}\n{text.raw_question(question)}", answer))
    return examples


def complete(model: Model, prompt: str, key: Array) -> str:
    """A prompt with a continuation sampled at temperature 1, up to eos or STORY_TOKENS tokens."""

    @jax.jit
    def next_token(tokens: Array, position: Array, step_key: Array) -> Array:
        return jax.random.categorical(step_key, forward(model.weights, model.config, tokens)[0, position])

    ids = model.encode(prompt)
    eos, pad = model.tokenizer.token_to_id(EOS), model.tokenizer.token_to_id(PAD)
    for step_key in jax.random.split(key, STORY_TOKENS - len(ids)):
        padded = jnp.array([ids + [pad] * (STORY_TOKENS - len(ids))])
        ids.append(int(next_token(padded, len(ids) - 1, step_key)))
        if ids[-1] == eos:
            break
    return model.tokenizer.decode(ids, skip_special_tokens=False)


def report(model: Model, count: int) -> Iterator[str]:
    """The lines of the report."""
    for num_facts in FACT_COUNTS:
        for form in ("raw", "chat"):
            examples = recall_examples(model, num_facts, count, form == "chat")
            tokens = np.mean([len(example.prompt) for example in examples])
            yield f"recall {form:4} {num_facts:4} facts {tokens:5.0f} tokens: {accuracy(model, examples):.1%}"
    for form in ("raw", "chat"):
        yield f"story questions {form:4}: {accuracy(model, story_examples(model, count, form == 'chat')):.1%}"
    opening = BOS + text.story_prompt("evaluate/0")
    request = model.chat_template.render(
        messages=[{"role": "user", "content": text.story("evaluate/1").request}],
        bos_token=BOS,
        eos_token=EOS,
        add_generation_prompt=True,
    )
    assert request.endswith(ASSISTANT)
    for number, prompt in enumerate((opening, request)):
        yield f"\n{complete(model, prompt, jax.random.key(number))}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure a demo model on unseen prompts.")
    parser.add_argument("model_dir", type=Path)
    parser.add_argument("--prompts", type=int, default=100, help="prompts for each form and length")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    arguments = parser.parse_args()
    for line in report(Model.load(arguments.model_dir, jnp.dtype(arguments.dtype)), arguments.prompts):
        print(line, flush=True)


if __name__ == "__main__":
    main()
