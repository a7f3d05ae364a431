"""Peak host memory of loading and converting, measured as anonymous resident memory in a fresh process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from checkpoints.plan import tensor_shapes
from fly_jax.models.config import ModelConfig
from tests.tiny_models import CASES

SIZES = {
    "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 16,
    "num_key_value_heads": 4, "head_dim": 32, "vocab_size": 8192, "torch_dtype": "float32",
}  # fmt: skip

MEASURE = """
import ctypes, gc, json, sys, threading
from pathlib import Path
import jax.numpy as jnp
from checkpoints.prepare import load_weights
from checkpoints.prepared import convert
from fly_jax.models.config import ModelConfig
from fly_jax.models.sharding import model_spec

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

def peak_of(action):
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what an earlier action freed must not hide what this one takes
    peak, stop, before = 0, threading.Event(), anonymous()
    def sample():
        nonlocal peak
        while not stop.wait(0.001):
            peak = max(peak, anonymous())
    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        kept = action()
    finally:
        stop.set()
        sampler.join()
    # On a busy machine the sampler may not have run since the last of the result came.
    return max(peak, anonymous()) - before

hf, out = Path(sys.argv[1]), Path(sys.argv[2])
spec = model_spec(ModelConfig.from_folder(hf), 4, jnp.dtype("float32"))
replica = sum(buffer.nbytes for buffer in spec.buffers.values())
peaks = {
    "hf": peak_of(lambda: load_weights(hf, spec, jnp.float32)),
    "convert": peak_of(lambda: convert(hf, out, max_tp=4, dtype=jnp.float32)),
    "prepared": peak_of(lambda: load_weights(out, spec, jnp.float32)),
    "half": peak_of(lambda: load_weights(out, spec, jnp.float32, base_shard=(1, 2))),
}
print(json.dumps({name: peak / replica for name, peak in peaks.items()} | {"replica": replica}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_is_at_most_a_fifth_above_one_replica(tmp_path: Path) -> None:
    config = CASES["llama_mha"] | SIZES
    rng = np.random.default_rng(0)
    shapes = tensor_shapes(ModelConfig.from_hf(config))
    save_file({n: rng.random(s, np.float32) for n, s in shapes.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    command = [sys.executable, "-c", MEASURE, str(tmp_path), str(tmp_path / "out")]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    ratios = json.loads(done.stdout.splitlines()[-1])
    assert ratios["replica"] > 100e6
    assert 0.9 < ratios["hf"] < 1.2, ratios  # below 0.9 the measurement would be wrong
    assert 0.9 < ratios["prepared"] < 1.2, ratios
    assert ratios["convert"] < 1.3, ratios
    assert ratios["half"] < 0.8, ratios  # half of the sharded buffers, all of the embedding table
