"""Whether views, the pool and tokens of the demo model are right on this device.

Run a second time with ``--against``, it computes the same tokens on the host and compares them.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from fly_jax.bench.gpu_parts.records import Records, part_parser, read
from fly_jax.platform import configure_devices, use_cpu_only

if TYPE_CHECKING:
    from fly_jax.engine.loader import LoadedModel

PROMPTS = (
    "Once upon a time",
    "Tom and his dog went to the park.",
    "The little girl was sad because",
    "One day, a big bird saw a small fish and said",
)
OUTPUT_TOKENS = 32
VIEW_DEGREES = (2, 4, 8)
# Tokens, and their log-probabilities, of each prompt.
Generated = tuple[list[list[int]], list[list[float]]]
# Of log-probabilities in float32; products of a GPU's tensor cores have 10 bits of mantissa by default.
TOLERANCE = 0.05


def main() -> int:
    parser = part_parser("engine", "Checks the engine with the demo model on one device.")
    parser.add_argument(
        "--against", type=Path, metavar="FILE", help="compute on the host, and compare with these records of a device"
    )
    parser.add_argument("--attention-backend", default="auto", help="see fly_jax.bench latency --help")
    options = parser.parse_args()
    if options.against is not None:
        use_cpu_only()
    configure_devices(1)
    return _run(options, Records(options.records))


def _run(options: argparse.Namespace, records: Records) -> int:
    import jax

    from checkpoints.demo import MODEL
    from fly_jax.bench.gpu_parts.stepping import load_on_one_device

    device = jax.devices()[0]
    limit = (device.memory_stats() or {}).get("bytes_limit")
    said = f"{device.device_kind}, jax {jax.__version__}"
    records.add(said, device_kind=device.device_kind, platform=device.platform, bytes_limit=limit)
    if options.against is None:
        _check_views(records)
    loaded = load_on_one_device(MODEL, dtype="float32", attention_backend=options.attention_backend, max_num_seqs=8)
    tokens, logprobs = _generate(loaded, records)
    if options.against is not None:
        (other,) = (each for each in read(options.against) if "tokens" in each)
        return _compare(records, (tokens, logprobs), (other["tokens"], other["logprobs"]))
    text = loaded.plan.tokenizer.decode(tokens[0])
    records.add(f"{PROMPTS[0]}{text}"[:80].replace("\n", " "), tokens=tokens, logprobs=logprobs)
    return 0


def _check_views(records: Records) -> None:
    """Rows of every rank at every degree, over a buffer of 64 MB: at their address and with their values.

    Raises:
        RuntimeError: a view was copied or shows other rows.
    """
    import jax
    import jax.numpy as jnp

    from fly_jax.device.views import view_rows

    base = jax.block_until_ready(jax.random.normal(jax.random.key(0), (8192, 4096), jnp.bfloat16))
    count = 0
    for degree in VIEW_DEGREES:
        rows = base.shape[0] // degree
        for rank in range(degree):
            view = view_rows(base, rank * rows, (rank + 1) * rows)  # which compares the addresses
            if not bool(jnp.array_equal(view, base[rank * rows : (rank + 1) * rows])):
                raise RuntimeError(f"the view of rank {rank} of {degree} shows other rows")
            count += 1
    records.add(f"{count} views at degrees 2, 4 and 8 lie at their addresses", views=count)


def _generate(loaded: LoadedModel, records: Records) -> Generated:
    """Greedy tokens and their log-probabilities, of each prompt.

    Raises:
        RuntimeError: the pool moved while prompts and decodes ran.
    """
    from fly_jax.bench.gpu_parts.stepping import add, step
    from fly_jax.sampling_params import SamplingParams

    engine, pool = loaded.engine(), loaded.runner.pool
    (group,) = engine.scheduler.groups
    before = pool.take(group).addressable_shards[0].data.unsafe_buffer_pointer()
    params = SamplingParams(max_tokens=OUTPUT_TOKENS, temperature=0.0, ignore_eos=True, logprobs=0)
    add(engine, [tuple(loaded.plan.tokenizer.encode(prompt)) for prompt in PROMPTS], params)
    tokens: list[list[int]] = [[] for _ in PROMPTS]
    logprobs: list[list[float]] = [[] for _ in PROMPTS]
    while engine.has_work:
        for delta in step(engine):
            tokens[int(delta.request_id)] += delta.token_ids
            logprobs[int(delta.request_id)] += [each.logprob for each in delta.logprobs]
    after = pool.take(group).addressable_shards[0].data.unsafe_buffer_pointer()
    if after != before:
        raise RuntimeError(f"steps moved the KV pool from {before:#x} to {after:#x}")
    steps = engine.stats().steps
    records.add(f"the KV pool is where it was after {steps} steps", steps=steps)
    return tokens, logprobs


def _compare(records: Records, mine: Generated, theirs: Generated) -> int:
    """Up to the first token that differs, after which texts are two.

    Returns:
        0 if no log-probability differs by more than the tolerance.
    """
    same, worst, total = 0, 0.0, 0
    for my_tokens, my_logprobs, their_tokens, their_logprobs in zip(*mine, *theirs, strict=True):
        total += len(my_tokens)
        for token, logprob, other, other_logprob in zip(
            my_tokens, my_logprobs, their_tokens, their_logprobs, strict=True
        ):
            worst = max(worst, abs(logprob - other_logprob))
            if token != other:
                break
            same += 1
    records.add(
        f"{same} of {total} tokens as on the host, log-probabilities within {worst:.2g}",
        same_tokens=same,
        tokens=total,
        worst_difference=worst,
    )
    return 0 if worst <= TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
