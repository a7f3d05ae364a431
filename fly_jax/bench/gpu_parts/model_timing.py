"""What is measured with a model of random weights on one device."""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import jax

from fly_jax.bench.gpu_parts.records import Records
from fly_jax.bench.gpu_parts.stepping import WaitTimer, add, drain, load_on_one_device, step
from fly_jax.bench.gpu_parts.trace import seconds_by_kernel
from fly_jax.bench.offline import PromptSource
from fly_jax.bench.timing import copy_bytes_per_second
from fly_jax.engine.engine import Engine
from fly_jax.engine.loader import LoadedModel
from fly_jax.sampling_params import SamplingParams

SHORT_PROMPT = 16
# Of a batch's steps, those at its begin in which prompts are still computed do not count, nor the last ones.
COUNTED_STEPS = 48
TRACED_STEPS, TRACED_BATCH, TRACED_KERNELS = 10, 8, 40
STEP_TOKENS = 2048
TIMING_SECONDS = 0.1


def measure(options: argparse.Namespace, records: Records) -> None:
    """Everything that is measured with one loaded model; see :mod:`fly_jax.bench.gpu_parts.model`."""
    rate = copy_bytes_per_second(options.copy_bytes, TIMING_SECONDS)
    started = time.perf_counter()
    loaded = load_on_one_device(
        options.model,
        load_format="dummy",
        attention_backend=options.attention_backend,
        max_num_seqs=max(options.batches),
        max_num_batched_tokens=max(STEP_TOKENS, max(options.batches) + SHORT_PROMPT * 2),
    )
    timer = WaitTimer(loaded.runner)
    timed = replace(loaded, runner=timer)
    seconds = time.perf_counter() - started
    weights, pool = loaded.runner.weights.resident_bytes, loaded.runner.pool.nbytes
    records.add(
        f"{weights / 1e9:.1f} GB of weights and {pool / 1e9:.1f} GB of KV ready in {seconds:.0f} s",
        load_seconds=seconds,
        weight_bytes=weights,
        kv_bytes=pool,
        programs=len(loaded.runner.executables),
        copy_bytes_per_second=rate,
    )
    for batch in options.batches:
        _measure_decodes(timed, timer, batch, weights / rate, records)
    _measure_prompt(timed, options.prompt, records)
    _trace(timed, min(TRACED_BATCH, max(options.batches)), records)


@dataclass(frozen=True)
class _Steps:
    """Of one batch in which every request decodes.

    Attributes:
        seconds: of a step.
        waited: of those, how long the host waited for the device.
        tokens: that came a step.
    """

    seconds: float
    waited: float
    tokens: float


def _measure_decodes(loaded: LoadedModel, timer: WaitTimer, batch: int, least: float, records: Records) -> None:
    """
    Args:
        least: seconds that reading all weights takes at the rate of a copy.
    """
    found = _timed_decodes(_decoding(loaded, batch, COUNTED_STEPS), timer, COUNTED_STEPS)
    host = found.seconds - found.waited
    records.add(
        f"batch {batch}: {1e3 * found.seconds:,.2f} ms a token, {least / found.seconds:.0%} of the weights' bandwidth "
        f"limit; the host works {1e6 * host:,.0f} us a step, {host / found.seconds:.0%}",
        batch=batch,
        tpot_ms=1e3 * found.seconds,
        tokens_per_second=found.tokens / found.seconds,
        host_us=1e6 * host,
        host_share=host / found.seconds,
        weight_bandwidth_share=least / found.seconds,
    )


def _decoding(loaded: LoadedModel, batch: int, steps: int) -> Engine:
    """An engine in which every prompt of a batch is done, with at least so many steps of decodes to come."""
    engine = loaded.engine()
    prompts = PromptSource(0, loaded.plan.model_config.vocab_size, SHORT_PROMPT)
    # Requests whose prompts come first decode while others' prompts are computed.
    most = steps + 8 + batch * SHORT_PROMPT // 64
    add(engine, prompts.take(batch), SamplingParams(max_tokens=most, ignore_eos=True))
    begun: set[str] = set()
    while len(begun) < batch:
        begun |= {delta.request_id for delta in step(engine) if delta.token_ids}
    return engine


def _timed_decodes(engine: Engine, timer: WaitTimer, steps: int) -> _Steps:
    """Of the next steps; the batch then runs to its end."""
    tokens, first, waited, started = 0, timer.steps, timer.waited, time.perf_counter()
    while timer.steps < first + steps:
        tokens += sum(len(delta.token_ids) for delta in step(engine))
    seconds, read = time.perf_counter() - started, timer.steps - first
    found = _Steps(seconds / read, (timer.waited - waited) / read, tokens / read)
    drain(engine)
    return found


def _measure_prompt(loaded: LoadedModel, tokens: int, records: Records) -> None:
    """Time to the first token of the only request, twice; the second counts."""
    prompts = PromptSource(1, loaded.plan.model_config.vocab_size, tokens)
    seconds = 0.0
    for _ in range(2):
        engine, prompt = loaded.engine(), prompts.take(1)
        started = time.perf_counter()
        add(engine, prompt, SamplingParams(max_tokens=1, ignore_eos=True))
        drain(engine)
        seconds = time.perf_counter() - started
    said = f"a prompt of {tokens:,} tokens: first token after {1e3 * seconds:,.1f} ms, {tokens / seconds:,.0f} tokens/s"
    records.add(said, prompt_tokens=tokens, ttft_ms=1e3 * seconds)


def _trace(loaded: LoadedModel, batch: int, records: Records) -> None:
    """What the device does in steps of decodes, by kernel."""
    engine = _decoding(loaded, batch, TRACED_STEPS)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(TRACED_STEPS):
                step(engine)
        kernels = seconds_by_kernel(Path(folder))
    drain(engine)
    total = kernels.total()
    shares = [f"{name[:32]} {seconds / total:.0%}" for name, seconds in kernels.most_common(4)]
    kept = dict(kernels.most_common(TRACED_KERNELS))
    records.add(f"trace: {', '.join(shares)}", batch=batch, steps=TRACED_STEPS, kernels=kept, seconds=total)
