"""The bundled demo model: its text generators, tokenizer, training and evaluation."""

from pathlib import Path

MODEL = Path(__file__).parent / "model"
