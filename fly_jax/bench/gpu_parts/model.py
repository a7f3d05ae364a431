"""A model of random weights end to end: time per output token, the host's share, a long prompt, a trace.

One process, since loading an 8B model and compiling its programs takes longer than all that is measured with it.
"""

from __future__ import annotations

import sys
from pathlib import Path

from fly_jax.bench.gpu_parts.records import Records, part_parser
from fly_jax.platform import configure_devices

COPY_BYTES = 10**9


def main() -> int:
    parser = part_parser("model", "Measures a model of random weights on one device.")
    parser.add_argument("--model", type=Path, required=True, help="folder with a config.json")
    parser.add_argument("--batches", type=int, nargs="+", required=True, help="requests that decode at once")
    parser.add_argument("--prompt", type=int, required=True, help="tokens of the long prompt")
    parser.add_argument("--copy-bytes", type=int, default=COPY_BYTES, help="that the device copies to be measured")
    parser.add_argument("--attention-backend", default="auto", help="see fly_jax.bench latency --help")
    options = parser.parse_args()
    configure_devices(1)
    from fly_jax.bench.gpu_parts.model_timing import measure  # jax comes with it: only once the devices are configured

    measure(options, Records(options.records))
    return 0


if __name__ == "__main__":
    sys.exit(main())
