"""Engine options, with vLLM's names where the thing is the same."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from pathlib import Path
from typing import Any

from fly_jax.errors import ConfigError
from fly_jax.outputs import SwitchStrategy

# Two tiles: one that decodes may have to share, and one of prompt.
MIN_PROMPT_TOKENS = 32
DTYPES = ("auto", "float32", "bfloat16", "float16")
LOAD_FORMATS = ("auto", "dummy")
POLICIES = ("auto", "load_adaptive", "static")
SCHEDULING_POLICIES = ("fcfs", "priority")
ATTENTION_BACKENDS = ("auto", "xla", "pallas")


def one_of(what: str, name: str, choices: Sequence[str]) -> str:
    """The name itself.

    Raises:
        ConfigError: it is none of the choices; the message lists them.
    """
    if name not in choices:
        raise ConfigError(f"{what} must be one of {', '.join(choices)}, got {name!r}")
    return name


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Everything an engine needs to know before it starts.

    Attributes:
        model: a Hugging Face folder or a folder made by ``fly-jax convert``.
        devices: how many devices to use; None: all (on CPU: 4 virtual ones).
        layout: the first layout (``2+2``, ``dp4``, ``tp4``, ...); None: the narrowest.
        layouts: the layouts that programs are compiled for; None: every one that fits the devices.
        policy: who chooses the layout: ``static`` keeps it until somebody asks for another, ``auto``
            (``load_adaptive``) plans it with the load.
        switch_strategy: what becomes of requests in flight at switches that name no strategy.
        scheduling_policy: ``fcfs``: requests run in order of arrival, and one that sets a priority is refused;
            ``priority``: a request with a lower priority number runs first.
        base_tp: smallest TP degree that holds the model; None: found from the memory.
        dtype: ``auto`` keeps the checkpoint's, float16 too. float16 ends at 65,504: a request whose logits are not
            finite ends with an error.
        load_format: ``dummy`` draws random weights on the devices from ``config.json`` alone, for measuring speed;
            ``auto`` reads the folder's.
        generation_config: where sampling options of requests that set none come from: ``auto``: the model's
            generation_config.json; ``vllm``: fixed ones; anything else: the folder of another such file.
        override_generation_config: temperature, top_k, top_p, min_p, max_new_tokens to take instead of the file's.
        max_model_len: context limit in tokens; None: the model's own.
        max_num_seqs: most requests running at once in one group.
        max_num_batched_tokens: most tokens one step of one group computes.
        max_num_queued_reqs: most requests waiting; more are refused.
        max_queued_per_client: most of them that one client may have; None: half of ``max_num_queued_reqs``.
        allow_request_width: requests may ask for a group of a width, for which the layout changes; False: one that
            asks for more than 1 is refused.
        engine_timeout: seconds without a finished step, while there is work, after which the engine counts as stuck
            (longer where steps are slow, by their times at warm-up); 0: never.
        block_size: tokens a KV block holds at TP 1.
        num_blocks: KV blocks a device; None: from the memory.
        attention_backend: ``xla``: plain JAX; ``pallas``: kernels for NVIDIA GPUs, interpreted (slowly) on CPU;
            ``auto``: kernels where there is a GPU.
        gpu_memory_utilization: fraction of an accelerator's memory used for weights and KV.
        device_memory_bytes: memory of one device; None: asked from the device (a CPU device: its share of the host's).
        optimization_level: XLA's backend level, 0 to 3; 0 compiles in half the time and runs slower. None: XLA's own.
        overlap: keep one step in flight while the next is prepared; False is the loop for debugging.
        seed: from which seeds of requests without one are drawn.
    """

    model: Path
    devices: int | None = None
    layout: str | None = None
    layouts: tuple[str, ...] | None = None
    policy: str = "auto"
    switch_strategy: SwitchStrategy = SwitchStrategy.MIGRATE
    scheduling_policy: str = "fcfs"
    base_tp: int | None = None
    dtype: str = "auto"
    load_format: str = "auto"
    generation_config: str = "auto"
    override_generation_config: Mapping[str, Any] = field(default_factory=dict, hash=False)
    max_model_len: int | None = None
    max_num_seqs: int = 32
    max_num_batched_tokens: int = 512
    max_num_queued_reqs: int = 1024
    max_queued_per_client: int | None = None
    allow_request_width: bool = True
    engine_timeout: float = 60.0
    block_size: int = 16
    num_blocks: int | None = None
    attention_backend: str = "auto"
    gpu_memory_utilization: float = 0.9
    device_memory_bytes: int | None = None
    optimization_level: int | None = None
    overlap: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "model", Path(self.model))
        for name, choices in (
            ("dtype", DTYPES),
            ("load_format", LOAD_FORMATS),
            ("policy", POLICIES),
            ("switch_strategy", tuple(SwitchStrategy)),
            ("scheduling_policy", SCHEDULING_POLICIES),
            ("attention_backend", ATTENTION_BACKENDS),
        ):
            one_of(name, getattr(self, name), choices)
        object.__setattr__(self, "switch_strategy", SwitchStrategy(self.switch_strategy))
        self._check_types()
        for name in ("max_num_seqs", "max_num_batched_tokens", "max_num_queued_reqs", "block_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.max_num_batched_tokens < self.max_num_seqs + MIN_PROMPT_TOKENS:
            # Decodes go first: with less, they could take a step's whole budget and prompts would never start.
            raise ConfigError(
                f"max_num_batched_tokens {self.max_num_batched_tokens} must be at least max_num_seqs "
                f"{self.max_num_seqs} + {MIN_PROMPT_TOKENS}: raise one or lower the other"
            )
        optional = ("devices", "base_tp", "max_model_len", "max_queued_per_client", "num_blocks", "device_memory_bytes")
        for name in optional:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")
        if self.optimization_level is not None and not 0 <= self.optimization_level <= 3:
            raise ConfigError(f"optimization_level must be between 0 and 3, got {self.optimization_level}")
        if not 0.0 <= self.engine_timeout < math.inf:
            raise ConfigError(f"engine_timeout must be at least 0 seconds, got {self.engine_timeout}")
        if not 0.0 < self.gpu_memory_utilization <= 1.0:
            raise ConfigError(f"gpu_memory_utilization must be in (0, 1], got {self.gpu_memory_utilization}")

    @property
    def queued_per_client(self) -> int:
        """Waiting places that one client may take; never more than there are."""
        if self.max_queued_per_client is None:
            return -(-self.max_num_queued_reqs // 2)
        return min(self.max_queued_per_client, self.max_num_queued_reqs)

    def _check_types(self) -> None:
        """Values of the right type; a boolean is no number, though Python counts with it."""
        integers = (
            "devices", "base_tp", "max_model_len", "max_num_seqs", "max_num_batched_tokens", "max_num_queued_reqs",
            "max_queued_per_client", "block_size", "num_blocks", "device_memory_bytes", "optimization_level", "seed",
        )  # fmt: skip
        for name in integers:
            value = getattr(self, name)
            optional = type(self).__dataclass_fields__[name].default is None
            if not (optional and value is None) and (isinstance(value, bool) or not isinstance(value, Integral)):
                raise ConfigError(f"{name} must be an integer, got {value!r}")
        for name in ("gpu_memory_utilization", "engine_timeout"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ConfigError(f"{name} must be a number, got {value!r}")
        for name in ("overlap", "allow_request_width"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if not isinstance(self.generation_config, str) or not isinstance(self.override_generation_config, Mapping):
            raise ConfigError("generation_config must be a string and override_generation_config a mapping")
