"""The model as those who send requests and read answers see it. No JAX."""

from __future__ import annotations

from dataclasses import dataclass

from fly_jax.sampling_params import SamplingDefaults
from fly_jax.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class ServedModel:
    """
    Attributes:
        eos_token_ids: the model's own end-of-sequence tokens.
        max_model_len: context limit in tokens.
        sampling_defaults: of requests that set none.
    """

    tokenizer: Tokenizer
    eos_token_ids: frozenset[int]
    vocab_size: int
    max_model_len: int
    sampling_defaults: SamplingDefaults
