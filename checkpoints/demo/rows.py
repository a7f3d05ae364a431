"""Training rows: token sequences with a weight for every token that is to be predicted.

A row is built from segments, some of which are targets. The facts of a recall task are random, so
predicting them teaches nothing: only answers (with the eos token that follows) are targets there,
and one list of facts is followed by as many questions as fit. Stories are targets from end to end,
at a lower weight because a row holds far more story tokens than answer tokens.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from checkpoints.demo import text
from checkpoints.demo.tokenizer import ASSISTANT, BOS, EOS, PAD, SYSTEM, USER

ANSWER_WEIGHT = 1.0
STORY_WEIGHT = 0.3
FACT_TOKENS = 6  # "-", " Mira", ":", " red", " kite", "\n"
QUESTION_TOKENS = 20  # an upper bound for a question with its answer, in either form
SYSTEM_PROMPT_SHARE = 0.2


@dataclass(frozen=True)
class Segment:
    """A piece of text, special tokens included, and the weight of its tokens as targets."""

    text: str
    weight: float = 0.0


@dataclass(frozen=True)
class Batch:
    """tokens [B, T + 1] and target weights [B, T]: weight t belongs to predicting token t + 1."""

    tokens: np.ndarray
    weights: np.ndarray


def recall_row(rng: random.Random, length: int, chat: bool) -> list[Segment]:
    """One list of facts that fills half of the row or more, then questions about different facts."""
    most_facts = min((length - QUESTION_TOKENS) // FACT_TOKENS, len(text.NAMES))
    num_facts = rng.randint((most_facts + 1) // 2, most_facts)
    num_questions = min(num_facts, length // 8)  # more than fit: the row is cut at its length
    tasks = text.recall_tasks(rng.getrandbits(64), num_facts, num_questions, "train")
    questions = [(task.question, task.answer) for task in tasks]
    return _conversation(rng, tasks[0].facts_text, questions, chat)


def story_question_row(rng: random.Random, chat: bool) -> list[Segment]:
    """A story and three questions about it."""
    tale = text.story(rng.getrandbits(64), "train")
    return _conversation(rng, tale.text + "\n", rng.sample(tale.questions, 3), chat)


def story_row(rng: random.Random, chat: bool) -> list[Segment]:
    """A story on its own, or as the reply to a request."""
    tale = text.story(rng.getrandbits(64), "train")
    target = Segment(tale.text + EOS, STORY_WEIGHT)
    if not chat:
        return [Segment(BOS), target]
    return [Segment(BOS + _system(rng) + USER + tale.request + EOS + ASSISTANT), target]


def _conversation(rng: random.Random, context: str, questions: list[tuple[str, str]], chat: bool) -> list[Segment]:
    """A context with questions and answers, in the chat form or the raw completion form."""
    segments = [Segment(BOS + (_system(rng) + USER if chat else "") + context)]
    for index, (question, answer) in enumerate(questions):
        if chat:
            opening = USER if index else ""
            segments += [
                Segment(opening + question + EOS + ASSISTANT),
                Segment(answer + EOS, ANSWER_WEIGHT),
            ]
        else:
            opening = "\n" if index else ""
            segments += [
                Segment(opening + text.raw_question(question)),
                Segment(" " + answer + EOS, ANSWER_WEIGHT),
            ]
    return segments


def _system(rng: random.Random) -> str:
    """A system message in some of the conversations, and nothing in the others."""
    return SYSTEM + rng.choice(text.SYSTEM_PROMPTS) + EOS if rng.random() < SYSTEM_PROMPT_SHARE else ""


def make_row(rng: random.Random, length: int, recall_share: float) -> list[Segment]:
    """A row of a random kind; stories are packed until the row is full."""
    chat = rng.random() < 0.5
    if rng.random() < recall_share:
        return recall_row(rng, length, chat)
    make = rng.choice((story_row, story_question_row))
    return [segment for _ in range(1 + length // 64) for segment in make(rng, rng.random() < 0.5)]


def make_batch(tokenizer: Tokenizer, seed: str, rows: int, length: int, recall_share: float) -> Batch:
    """The batch of a seed: rows are cut at length + 1 tokens or padded to it."""
    rng = text.stream(seed, "train")
    all_segments = [make_row(rng, length, recall_share) for _ in range(rows)]
    flat = [segment.text for segments in all_segments for segment in segments]
    encodings = iter(tokenizer.encode_batch_fast(flat, add_special_tokens=False))
    tokens = np.full((rows, length + 1), tokenizer.token_to_id(PAD), np.int32)
    weights = np.zeros((rows, length + 1), np.float32)
    for row, segments in enumerate(all_segments):
        end = 0
        for segment in segments:
            ids = next(encodings).ids[: max(0, length + 1 - end)]
            tokens[row, end : end + len(ids)] = ids
            weights[row, end : end + len(ids)] = segment.weight
            end += len(ids)
    return Batch(tokens, weights[:, 1:])
