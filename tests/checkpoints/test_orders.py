"""The prepared orders against the Hugging Face tensors: written out naively, and by what they compute when sharded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoints.plan import plan, tensor_shapes
from fly_jax.errors import ConfigError
from fly_jax.models.config import ModelConfig
from fly_jax.models.partition import Partition
from fly_jax.models.sharding import ModelSpec, model_spec
from tests.checkpoints.models import MAX_TPS, ORDER_CASES, load, make, tensors
from tests.tiny_models import CASES, parameter_shapes

Arrays = dict[str, np.ndarray]

LAYER, HF_LAYER = "layers.0.", "model.layers.0."


@pytest.fixture(params=ORDER_CASES)
def case(request: pytest.FixtureRequest) -> dict[str, Any]:
    return ORDER_CASES[request.param]


def shard(array: np.ndarray, rank: int, degree: int) -> np.ndarray:
    rows = array.shape[0] // degree
    assert rows * degree == array.shape[0]
    return array[rank * rows : (rank + 1) * rows]


def degrees(max_tp: int) -> list[int]:
    return [1 << power for power in range(max_tp.bit_length())]


def stacked_heads(hf: Arrays, name: str, head_dim: int) -> np.ndarray:
    """A projection's weight with its bias as one more column, ``[heads, head_dim, hidden + 1]``."""
    weight = hf[f"{HF_LAYER}self_attn.{name}.weight"]
    bias = hf.get(f"{HF_LAYER}self_attn.{name}.bias", np.zeros(weight.shape[0], np.float32))
    return np.concatenate([weight, bias[:, None]], axis=1).reshape(-1, head_dim, weight.shape[1] + 1)


def with_bias(prepared: Arrays, name: str) -> np.ndarray:
    weight = prepared[LAYER + name]
    bias = prepared.get(f"{LAYER}{name}_bias", np.zeros(weight.shape[0], np.float32))
    return np.concatenate([weight, bias[:, None]], axis=1)


def mix(query: np.ndarray, key: np.ndarray, value: np.ndarray) -> np.ndarray:
    """One head of attention without its softmax, ``[tokens, head_dim]``: any wrong pairing of heads changes it."""
    return (query @ key.T) @ value


def whole_attention(hf: Arrays, config: ModelConfig, x: np.ndarray) -> np.ndarray:
    query, key, value = (stacked_heads(hf, f"{name}_proj", config.head_dim) for name in "qkv")
    ratio = config.num_heads // config.num_kv_heads
    heads = [mix(x @ query[h].T, x @ key[h // ratio].T, x @ value[h // ratio].T) for h in range(config.num_heads)]
    return np.concatenate(heads, axis=1) @ hf[f"{HF_LAYER}self_attn.o_proj.weight"].T


def sharded_attention(prepared: Arrays, part: Partition, x: np.ndarray, degree: int) -> np.ndarray:
    total: np.ndarray | float = 0.0
    for rank in range(degree):
        qkv = shard(with_bias(prepared, "attention.qkv"), rank, degree)
        output = shard(prepared[LAYER + "attention.output"], rank, degree)
        units = qkv.reshape(-1, part.queries_per_unit + 2, part.head_dim, x.shape[1])
        heads = [mix(x @ query.T, x @ unit[-2].T, x @ unit[-1].T) for unit in units for query in unit[:-2]]
        total = total + np.concatenate(heads, axis=1) @ output
    return np.asarray(total)


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def whole_mlp(hf: Arrays, x: np.ndarray) -> np.ndarray:
    def project(name: str) -> np.ndarray:
        weight = hf[f"{HF_LAYER}mlp.{name}.weight"]
        return x[:, :-1] @ weight.T + hf.get(f"{HF_LAYER}mlp.{name}.bias", np.float32(0))

    return (silu(project("gate_proj")) * project("up_proj")) @ hf[f"{HF_LAYER}mlp.down_proj.weight"].T


def sharded_mlp(prepared: Arrays, part: Partition, x: np.ndarray, degree: int) -> np.ndarray:
    total: np.ndarray | float = 0.0
    for rank in range(degree):
        fused = (x @ shard(with_bias(prepared, "mlp.gate_up"), rank, degree).T).reshape(len(x), -1, 2, part.ffn_chunk)
        gated = (silu(fused[:, :, 0]) * fused[:, :, 1]).reshape(len(x), -1)
        total = total + gated @ shard(prepared[LAYER + "mlp.down"], rank, degree)
    return np.asarray(total)


@pytest.mark.parametrize("max_tp", MAX_TPS)
def test_sharded_layers_compute_what_the_whole_tensors_do(tmp_path: Path, case: dict[str, Any], max_tp: int) -> None:
    spec = make(tmp_path, case, max_tp=max_tp)
    hf, prepared = tensors(tmp_path), load(tmp_path, spec)
    x = np.random.default_rng(0).standard_normal((3, spec.config.hidden_size + 1)).astype(np.float32)
    x[:, -1] = 1  # multiplies the column that holds the bias
    for degree in degrees(max_tp):
        attention = sharded_attention(prepared, spec.partition, x, degree)
        np.testing.assert_allclose(attention, whole_attention(hf, spec.config, x), rtol=1e-4, atol=1e-3)
        np.testing.assert_allclose(
            sharded_mlp(prepared, spec.partition, x, degree), whole_mlp(hf, x), rtol=1e-4, atol=1e-3
        )


def expected_qkv(hf: Arrays, spec: ModelSpec) -> np.ndarray:
    """Slot by slot: which head it holds is derived from the docstrings, not from ``Partition``'s index arrays."""
    config, part = spec.config, spec.partition
    query, key, value = (stacked_heads(hf, f"{name}_proj", config.head_dim) for name in "qkv")
    ratio, nothing = config.num_heads // config.num_kv_heads, np.zeros_like(query[0])
    slots = []
    for unit in range(part.units):
        head, copy = divmod(unit, part.kv_copies)
        real = head < config.num_kv_heads
        mine = range(copy * part.queries_per_unit, (copy + 1) * part.queries_per_unit)
        slots += [query[head * ratio + q] if real and q < ratio else nothing for q in mine]
        slots += [key[head], value[head]] if real else [nothing, nothing]
    return np.concatenate(slots)


def expected_gate_up(hf: Arrays, part: Partition, kind: str) -> np.ndarray:
    padded = []
    for name in ("gate_proj", "up_proj"):
        tensor = hf[f"{HF_LAYER}mlp.{name}.{kind}"]
        padding = np.zeros((part.ffn - len(tensor), *tensor.shape[1:]), np.float32)
        padded.append(np.concatenate([tensor, padding]).reshape(part.max_tp, part.ffn_chunk, *tensor.shape[1:]))
    return np.stack(padded, axis=1).reshape(2 * part.ffn, *padded[0].shape[2:])


def padded_rows(tensor: np.ndarray, rows: int) -> np.ndarray:
    return np.concatenate([tensor, np.zeros((rows - len(tensor), *tensor.shape[1:]), np.float32)])


@pytest.mark.parametrize("max_tp", MAX_TPS)
def test_buffers_bit_for_bit(tmp_path: Path, case: dict[str, Any], max_tp: int) -> None:
    spec = make(tmp_path, case, max_tp=max_tp)
    hf, prepared, part, config = tensors(tmp_path), load(tmp_path, spec), spec.partition, spec.config
    assert {name: array.shape for name, array in prepared.items()} == {n: b.shape for n, b in spec.buffers.items()}
    np.testing.assert_array_equal(with_bias(prepared, "attention.qkv"), expected_qkv(hf, spec))
    np.testing.assert_array_equal(prepared[LAYER + "mlp.gate_up"], expected_gate_up(hf, part, "weight"))
    down = hf[f"{HF_LAYER}mlp.down_proj.weight"].T
    np.testing.assert_array_equal(prepared[LAYER + "mlp.down"], padded_rows(down, part.ffn))
    plain = {
        "embedding": "model.embed_tokens.weight",
        "lm_head.weight": "lm_head.weight",
        "final_norm": "model.norm.weight",
        LAYER + "attention_norm": HF_LAYER + "input_layernorm.weight",
        LAYER + "mlp_norm": HF_LAYER + "post_attention_layernorm.weight",
        LAYER + "attention.query_norm": HF_LAYER + "self_attn.q_norm.weight",
        LAYER + "attention.key_norm": HF_LAYER + "self_attn.k_norm.weight",
        LAYER + "attention.output_bias": HF_LAYER + "self_attn.o_proj.bias",
        LAYER + "mlp.down_bias": HF_LAYER + "mlp.down_proj.bias",
    }
    for name, tensor in plain.items():
        assert (name in prepared) == (tensor in hf), name
        if name in prepared:
            np.testing.assert_array_equal(prepared[name], padded_rows(hf[tensor], len(prepared[name])), err_msg=name)
    if config.mlp_bias:
        np.testing.assert_array_equal(prepared[LAYER + "mlp.gate_up_bias"], expected_gate_up(hf, part, "bias"))


def test_base_shards_concatenate_to_the_whole(tmp_path: Path, case: dict[str, Any]) -> None:
    spec = make(tmp_path, case, max_tp=8)
    whole = load(tmp_path, spec)
    for count in (2, 4, 8):
        shards = [load(tmp_path, spec, base_shard=(index, count)) for index in range(count)]
        for name, buffer in spec.buffers.items():
            if buffer.sharded:
                np.testing.assert_array_equal(np.concatenate([held[name] for held in shards]), whole[name])
            else:
                for held in shards:
                    np.testing.assert_array_equal(held[name], whole[name])


def test_shapes_are_those_of_the_checkpoints() -> None:
    for config in CASES.values():
        try:
            parsed = ModelConfig.from_hf(config)
        except ConfigError:  # what the engine does not support is the subject of another test
            continue
        assert tensor_shapes(parsed) == parameter_shapes(config)


def test_every_row_is_planned_once() -> None:
    spec = model_spec(ModelConfig.from_hf(ORDER_CASES["odd_ffn_and_vocabulary"]), 8, np.dtype("float32"))
    for name, rows in plan(spec).items():
        ends = [piece.target + piece.rows for piece in rows.pieces]
        starts = [piece.target for piece in rows.pieces]
        assert all(end <= start for end, start in zip(ends, starts[1:], strict=False)), name
        assert ends[-1] <= spec.buffers[name].shape[0], name


def test_big_copies_stay_big() -> None:
    """Adjacent heads and chunks are one piece: a copy a head would make loading a large model slow."""
    spec = model_spec(ModelConfig.from_hf(ORDER_CASES["gqa"]), 2, np.dtype("float32"))
    plans = plan(spec)
    assert len(plans["layers.0.attention.output"].pieces) == 1
    assert len(plans["layers.0.attention.qkv"].pieces) == 2 * 3
    assert len(plans["layers.0.mlp.gate_up"].pieces) == 2 * 2
