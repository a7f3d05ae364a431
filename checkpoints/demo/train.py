"""Trains the demo model from nothing: `python -m checkpoints.demo.train --out MODEL_DIR`.

The run is a list of phases with growing sequence lengths. Looking a key up is learnt fast, and
cheaply, on short rows; longer rows then teach it to hold over the whole context. Every row is
generated from its phase and step, so this package alone reproduces the run.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from tokenizers import Tokenizer

from checkpoints.demo import plain_llama
from checkpoints.demo.export import write_model
from checkpoints.demo.initial import initial_weights
from checkpoints.demo.plain_llama import LlamaConfig
from checkpoints.demo.rows import ANSWER_WEIGHT, make_batch
from checkpoints.demo.tokenizer import VOCAB_SIZE, train_tokenizer, write_tokenizer

SEED = 0
CONFIG = LlamaConfig(
    vocab_size=VOCAB_SIZE,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=3,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=32,
    rope_theta=500000.0,
    rms_norm_eps=1e-5,
    max_position_embeddings=1024,
    tie_word_embeddings=True,
)
REPORT_STEPS = 25
EXPORT_STEPS = 50


@dataclass(frozen=True)
class Phase:
    """Steps of tokens_per_step tokens each, in rows whose lengths take turns from step to step.

    The learning rate goes in a straight line through the phase.
    """

    steps: int
    lengths: tuple[int, ...]
    tokens_per_step: int
    recall_share: float  # the other rows are stories and questions about them
    learning_rate: tuple[float, float]


PHASES = (
    Phase(50, (64,), 2048, 0.8, (0.0, 2e-3)),
    Phase(150, (64,), 2048, 0.8, (2e-3, 2e-3)),
    Phase(200, (128,), 2048, 0.7, (2e-3, 2e-3)),
    Phase(150, (256, 512), 2048, 0.7, (2e-3, 1.2e-3)),
    Phase(300, (1024, 256, 1024), 2048, 0.7, (1.2e-3, 2e-5)),
    Phase(240, (256, 1024, 256), 2048, 0.4, (7e-4, 1e-5)),
)


class TrainState(NamedTuple):
    """Weights and optimizer state: all that a phase hands to the next."""

    weights: dict[str, Array]
    optimizer: optax.OptState


class Metrics(NamedTuple):
    """Scalars of one step."""

    loss: Array  # weighted mean cross entropy over all targets
    accuracy: Array  # greedy hits among the first tokens of answers


def learning_rate(phases: tuple[Phase, ...]) -> optax.Schedule:
    """The learning rate over the steps of all phases."""
    pieces = [optax.linear_schedule(*phase.learning_rate, phase.steps) for phase in phases]
    return optax.join_schedules(pieces, np.cumsum([phase.steps for phase in phases])[:-1].tolist())


def make_optimizer(schedule: optax.Schedule) -> optax.GradientTransformation:
    """AdamW with clipped gradients; norm scales are not decayed."""
    not_norms = partial(jax.tree.map, lambda weight: weight.ndim > 1)
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(schedule, b1=0.9, b2=0.98, weight_decay=0.02, mask=not_norms),
    )


def loss_fn(weights: dict[str, Array], tokens: Array, target_weights: Array) -> tuple[Array, Metrics]:
    """Loss of tokens [B, T + 1] whose targets, the last T of each row, have weights [B, T]."""
    logits = plain_llama.forward(weights, CONFIG, tokens[:, :-1])
    targets = tokens[:, 1:]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    loss = (losses * target_weights).sum() / target_weights.sum()
    answers = target_weights == ANSWER_WEIGHT
    answers &= ~jnp.pad(answers, ((0, 0), (1, 0)))[:, :-1]  # only where an answer starts
    hits = (logits.argmax(-1) == targets) & answers
    return loss, Metrics(loss, hits.sum() / answers.sum())


Step = Callable[[TrainState, np.ndarray, np.ndarray], tuple[TrainState, Metrics]]


def make_step(optimizer: optax.GradientTransformation) -> Step:
    """The compiled training step; it takes over the state's memory."""

    @partial(jax.jit, donate_argnums=0)
    def step(state: TrainState, tokens: Array, target_weights: Array) -> tuple[TrainState, Metrics]:
        gradients, metrics = jax.grad(loss_fn, has_aux=True)(state.weights, tokens, target_weights)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.weights)
        return TrainState(optax.apply_updates(state.weights, updates), optimizer_state), metrics

    return step


def save_state(path: Path, finished: int, state: TrainState) -> None:
    """Saves the state after so many finished phases, to resume from it."""
    leaves: dict[str, Any] = {f"leaf_{i}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(state))}
    np.savez(path, finished=finished, **leaves)


def load_state(path: Path, like: TrainState) -> tuple[int, TrainState]:
    """The number of finished phases and the state after them."""
    with np.load(path) as saved:
        leaves, structure = jax.tree.flatten(like)
        loaded = [jnp.asarray(saved[f"leaf_{index}"]) for index in range(len(leaves))]
        return int(saved["finished"]), jax.tree.unflatten(structure, loaded)


def run_phase(number: int, state: TrainState, step: Step, tokenizer: Tokenizer, model_dir: Path) -> TrainState:
    """Runs one phase, with a report and an export every so many steps."""
    phase = PHASES[number]
    start = time.monotonic()
    recent: list[Metrics] = []
    for index in range(phase.steps):
        length = phase.lengths[index % len(phase.lengths)]
        rows = phase.tokens_per_step // length
        batch = make_batch(tokenizer, f"{number}/{index}", rows, length, phase.recall_share)
        state, metrics = step(state, batch.tokens, batch.weights)
        recent.append(metrics)
        if (index + 1) % REPORT_STEPS == 0:
            # A batch of stories only has no answers, and 0 / 0 as its accuracy.
            loss, accuracy = np.nanmean(jax.device_get(recent), axis=0)
            recent.clear()
            print(
                f"phase {number} step {index + 1}/{phase.steps} loss {loss:.3f} answers {accuracy:.3f} "
                f"seconds {time.monotonic() - start:.0f}",
                flush=True,
            )
        if (index + 1) % EXPORT_STEPS == 0:
            write_model(model_dir, CONFIG, state.weights)
    write_model(model_dir, CONFIG, state.weights)
    return state


def train(model_dir: Path, state_path: Path | None) -> None:
    """Runs all phases; with a state file, skips the phases that it has behind it."""
    tokenizer = train_tokenizer()
    write_tokenizer(tokenizer, model_dir, CONFIG.max_position_embeddings)
    optimizer = make_optimizer(learning_rate(PHASES))
    weights = initial_weights(CONFIG, tokenizer, jax.random.key(SEED))
    state = TrainState(weights, optimizer.init(weights))
    finished = 0
    if state_path is not None and state_path.exists():
        finished, state = load_state(state_path, state)
    step = make_step(optimizer)
    for number in range(finished, len(PHASES)):
        state = run_phase(number, state, step, tokenizer, model_dir)
        if state_path is not None:
            save_state(state_path, number + 1, state)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the bundled demo model.")
    parser.add_argument("--out", type=Path, required=True, help="the model folder to write")
    parser.add_argument("--state", type=Path, help="an .npz file to save finished phases in and to resume from")
    arguments = parser.parse_args()
    train(arguments.out, arguments.state)


if __name__ == "__main__":
    main()
