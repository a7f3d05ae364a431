"""What a model's makers recommend for requests that say nothing: ``generation_config.json``, read as vLLM reads it.

``do_sample`` is not read: a request is sampled by its temperature, as in vLLM and in OpenAI's API.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fly_jax.errors import ConfigError, InvalidRequestError
from fly_jax.host.json_files import read_json
from fly_jax.sampling_params import SamplingDefaults, SamplingParams

FILE = "generation_config.json"
MODEL_FILE = "config.json"
# By their names there, and what they are called in a request.
_FIELDS = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "max_new_tokens": "max_tokens",
}
# What transformers 4 left in every config.json: nobody's recommendation.
_LEFT_IN_CONFIG = {"temperature": 1.0, "top_k": 50, "top_p": 1.0}
# What would change the text and is not done, unless it has this value.
_NOT_APPLIED: dict[str, Any] = {
    "repetition_penalty": 1.0, "encoder_repetition_penalty": 1.0, "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0, "typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "top_h": None,
    "num_beams": 1, "penalty_alpha": None, "guidance_scale": 1.0, "bad_words_ids": None, "suppress_tokens": None,
    "begin_suppress_tokens": None, "sequence_bias": None, "forced_bos_token_id": None, "forced_eos_token_id": None,
    "exponential_decay_length_penalty": None, "min_length": 0, "min_new_tokens": 0, "stop_strings": None,
}  # fmt: skip

_log = logging.getLogger(__name__)


def generation_folder(choice: str, model: Path) -> Path:
    """The folder whose generation_config.json counts: the model's own, or with a path as the choice that one.

    Raises:
        ConfigError: no such file in the folder that was chosen.
    """
    if choice in ("auto", "vllm"):
        return model
    folder = Path(choice)
    if not (folder / FILE).is_file():
        raise ConfigError(f"generation_config {choice!r}: {folder / FILE} is missing: give auto, vllm or its folder")
    return folder


def read_sampling_defaults(choice: str, override: Mapping[str, Any], model: Path) -> SamplingDefaults:
    """Reads the defaults and says in the log, once, what they are and what is not applied.

    Args:
        choice: ``auto``: generation_config.json of the model's folder, or config.json where there is none;
            ``vllm``: neither; anything else: the folder of another generation_config.json.
        override: fields that win over those of the file.

    Raises:
        ConfigError: a value is out of range, or a field to override is none of those that are applied.
        CheckpointError: the file is damaged.
    """
    if unknown := [name for name in override if name not in _FIELDS]:
        raise ConfigError(f"override_generation_config cannot set {unknown[0]!r}: it can set {', '.join(_FIELDS)}")
    source, found = _recommended(choice, model)
    given = {name: value for name, value in ({**found, **override}).items() if name in _FIELDS and value is not None}
    try:
        params = SamplingParams(**{_FIELDS[name]: value for name, value in given.items()})
    except InvalidRequestError as error:
        raise ConfigError(f"{source}: {error}: mend it, or give --generation-config vllm") from error
    defaults = SamplingDefaults(**{field: getattr(params, field) for name, field in _FIELDS.items() if name in given})
    _say(source, given, {name: value for name, value in found.items() if _is_not_applied(name, value)})
    return defaults


def eos_token_ids(choice: str, model: Path, own: int | None) -> frozenset[int]:
    """What ends a text: ids of generation_config.json, else of config.json; and the tokenizer's own, as in vLLM.

    Args:
        choice: as of :func:`read_sampling_defaults`; with ``vllm`` the model's own file counts here.
        own: the tokenizer's end of sequence, if it has one.

    Raises:
        ConfigError: what is there is no token id or list of them.
    """
    always = frozenset() if own is None else frozenset({own})
    for path in (generation_folder(choice, model) / FILE, model / MODEL_FILE):
        value = read_json(path).get("eos_token_id") if path.exists() else None
        if value is None:
            continue
        token_ids = value if isinstance(value, list) else [value]
        if any(type(token_id) is not int for token_id in token_ids):  # isinstance would take booleans
            raise ConfigError(f"{path}: eos_token_id={value!r} must be a token id or a list of them")
        return frozenset(token_ids) | always
    return always


def _recommended(choice: str, model: Path) -> tuple[Path, dict[str, Any]]:
    """The file that counts and all its fields."""
    path = generation_folder(choice, model) / FILE
    if choice == "vllm":
        return path, {}
    if path.is_file():
        return path, read_json(path)
    raw = read_json(model / MODEL_FILE)
    return model / MODEL_FILE, {name: raw[name] for name in raw if raw[name] != _LEFT_IN_CONFIG.get(name)}


def _is_not_applied(name: str, value: Any) -> bool:
    return name in _NOT_APPLIED and value is not None and value != [] and value != _NOT_APPLIED[name]


def _say(source: Path, applied: Mapping[str, Any], left: Mapping[str, Any]) -> None:
    def listed(fields: Mapping[str, Any]) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in fields.items())

    if applied or left:
        _log.log(
            logging.WARNING if left else logging.INFO,
            "requests that set no sampling options get those of %s: %s%s (--generation-config vllm: none of them)",
            source,
            listed(applied) or "none",
            f"; not applied: {listed(left)}" if left else "",
        )
