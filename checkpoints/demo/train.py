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
from typing import NamedTuple

import jax
import numpy as np
import optax
from jax import Array

from checkpoints.demo import plain_llama
from checkpoints.demo.export import write_model
from checkpoints.demo.initial import initial_weights
from checkpoints.demo.plain_llama import LlamaConfig
from checkpoints.demo.rows import ANSWER_WEIGHT, Mixture, make_batch
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
    rope_theta=10000.0,
    rms_norm_eps=1e-5,
    max_position_embeddings=1024,
    tie_word_embeddings=True,
)
REPORT_STEPS = 25
EXPORT_STEPS = 100


@dataclass(frozen=True)
class Phase:
    """Steps of tokens_per_step tokens each, in rows whose lengths take turns from step to step.

    The learning rate goes in a straight line through the phase.
    """

    steps: int
    lengths: tuple[int, ...]
    tokens_per_step: int
    mixture: Mixture
    learning_rate: tuple[float, float]


PHASES = (
    Phase(50, (64,), 2048, Mixture(recall=0.9, repeat=0.5), (0.0, 2e-3)),
    Phase(350, (64,), 2048, Mixture(recall=0.9, repeat=0.4), (2e-3, 2e-3)),
    Phase(400, (128,), 2048, Mixture(recall=0.8, repeat=0.1), (2e-3, 2e-3)),
    Phase(300, (256, 512), 4096, Mixture(recall=0.7, repeat=0.0), (2e-3, 1.5e-3)),
    Phase(450, (1024, 256, 1024), 4096, Mixture(recall=0.7, repeat=0.0), (1.5e-3, 2e-5)),
)


class TrainState(NamedTuple):
    """Weights and optimizer state: all that a phase hands to the next."""

    weights: dict[str, Array]
    optimizer: optax.OptState


class Metrics(NamedTuple):
    """Scalars of one step."""

    loss: Array  # weighted mean cross entropy over all targets
    accuracy: Array  # greedy hits among answer tokens


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


def save_state(path: Path, phase: int, state: TrainState) -> None:
    """Saves the state after a phase, to resume from it."""
    leaves = {f"leaf_{index}": np.asarray(leaf) for index, leaf in enumerate(jax.tree.leaves(state))}
    np.savez(path, phase=phase, **leaves)


def load_state(path: Path, like: TrainState) -> tuple[int, TrainState]:
    """The last finished phase and the state after it."""
    with np.load(path) as saved:
        leaves, structure = jax.tree.flatten(like)
        loaded = [jax.numpy.asarray(saved[f"leaf_{index}"]) for index in range(len(leaves))]
        return int(saved["phase"]), jax.tree.unflatten(structure, loaded)


def train(model_dir: Path, state_path: Path | None) -> None:
    """Runs all phases; with a state file, skips the phases that it has behind it."""
    tokenizer = train_tokenizer()
    write_tokenizer(tokenizer, model_dir, CONFIG.max_position_embeddings)
    optimizer = make_optimizer(learning_rate(PHASES))
    weights = initial_weights(CONFIG, tokenizer, jax.random.key(SEED))
    state = TrainState(weights, optimizer.init(weights))
    first_phase = 0
    if state_path is not None and state_path.exists():
        last_phase, state = load_state(state_path, state)
        first_phase = last_phase + 1
    step = make_step(optimizer)
    start, tokens_seen = time.monotonic(), 0
    for number, phase in list(enumerate(PHASES))[first_phase:]:
        history: list[Metrics] = []
        for index in range(phase.steps):
            length = phase.lengths[index % len(phase.lengths)]
            rows = phase.tokens_per_step // length
            batch = make_batch(tokenizer, f"{number}/{index}", rows, length, phase.mixture)
            state, metrics = step(state, batch.tokens, batch.weights)
            history.append(metrics)
            tokens_seen += phase.tokens_per_step
            if (index + 1) % REPORT_STEPS == 0:
                loss, accuracy = np.mean(jax.device_get(history[-REPORT_STEPS:]), axis=0)
                print(
                    f"phase {number} step {index + 1}/{phase.steps} loss {loss:.3f} answers {accuracy:.3f} "
                    f"tokens {tokens_seen} seconds {time.monotonic() - start:.0f}",
                    flush=True,
                )
            if (index + 1) % EXPORT_STEPS == 0:
                write_model(model_dir, CONFIG, state.weights)
        write_model(model_dir, CONFIG, state.weights)
        if state_path is not None:
            save_state(state_path, number, state)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the bundled demo model.")
    parser.add_argument("--out", type=Path, required=True, help="the model folder to write")
    parser.add_argument("--state", type=Path, help="an .npz file to save finished phases in and to resume from")
    arguments = parser.parse_args()
    train(arguments.out, arguments.state)


if __name__ == "__main__":
    main()
