"""Trains the demo model's byte-level BPE tokenizer and writes it in Hugging Face format.

Byte-level means that every UTF-8 string has an encoding and decodes to itself. The words of the
generators become single tokens (with and without a leading space where both occur), which keeps
facts short; rarer text falls back to smaller pieces.
"""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from checkpoints.demo import text

PAD, BOS, EOS = "<|pad|>", "<|bos|>", "<|eos|>"
SYSTEM, USER, ASSISTANT = "<|system|>", "<|user|>", "<|assistant|>"
SPECIAL_TOKENS = (PAD, BOS, EOS, SYSTEM, USER, ASSISTANT)  # their ids are their positions here

VOCAB_SIZE = 1472
NUM_SAMPLES = 6000

# Every message is its role token, its content and the eos token; there are no newlines between.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('Roles are system, user and assistant, not ' + message['role']) }}"
    "{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def corpus() -> list[str]:
    """Text with every kind of line that the model sees; single-token words are frequent in it."""
    samples: list[str] = []
    for index in range(NUM_SAMPLES):
        tale = text.story(index, "tokenizer")
        samples += [tale.text, tale.request]
        for question, answer in tale.questions:
            samples += [text.raw_question(question), " " + answer, answer]
        for task in text.recall_tasks(index, 16, 4, "tokenizer"):
            samples += [task.prompt, " " + task.answer, task.answer]
    return samples + list(text.SYSTEM_PROMPTS) * 50


def train_tokenizer() -> Tokenizer:
    """A byte-level BPE tokenizer; encoding with special tokens puts bos in front, as Llama's does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    bos_id = SPECIAL_TOKENS.index(BOS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, bos_id)]
    )
    return tokenizer


def write_tokenizer(tokenizer: Tokenizer, model_dir: Path, max_length: int) -> None:
    """Writes tokenizer.json and tokenizer_config.json."""
    model_dir.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(model_dir / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
        "chat_template": CHAT_TEMPLATE,
    }
    (model_dir / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
