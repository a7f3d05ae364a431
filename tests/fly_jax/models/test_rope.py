from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from fly_jax.errors import ConfigError
from fly_jax.models.rope import RopeConfig, apply_rope, parse_rope, rope_tables

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def parse(scaling: Any = None, *, max_positions: int = 256, head_dim: int = 32, **raw: Any) -> RopeConfig:
    return parse_rope({"rope_scaling": scaling, **raw}, head_dim, max_positions)


def tables(rope: RopeConfig, positions: list[int], context: int) -> tuple[np.ndarray, np.ndarray]:
    cos, sin = rope_tables(rope, jnp.array(positions, jnp.int32), jnp.full(len(positions), context, jnp.int32))
    return np.asarray(cos), np.asarray(sin)


@pytest.mark.parametrize(
    "scaling",
    [{"type": "linear", "factor": 2}, LLAMA3, {"rope_type": "yarn", "factor": 4.0, "beta_fast": 16, "truncate": False}],
)
def test_both_spellings_of_transformers_are_read_alike(scaling: dict[str, Any]) -> None:
    kind = scaling.get("rope_type", scaling.get("type"))
    options = {name: value for name, value in scaling.items() if name not in ("type", "rope_type")}
    old = parse_rope({"rope_scaling": scaling, "rope_theta": 5e5}, 32, 256)
    new = parse_rope({"rope_parameters": {"rope_type": kind, "rope_theta": 5e5, **options}}, 32, 256)
    both = parse_rope({"rope_scaling": {"type": kind, "rope_type": kind, **options}, "rope_theta": 5e5}, 32, 256)
    assert old == new == both
    assert old.theta == 5e5
    assert old.kind == kind


@pytest.mark.parametrize("raw", [{}, {"rope_scaling": None}, {"rope_scaling": {}}, {"rope_parameters": None}])
def test_no_scaling_is_the_default_kind(raw: dict[str, Any]) -> None:
    assert parse_rope(raw, 32, 256) == RopeConfig("default", 10000.0, 32, 256)


@pytest.mark.parametrize("kind", ["longrope", "su", "mrope", "Linear"])
def test_an_unsupported_kind_is_refused_by_name(kind: str) -> None:
    with pytest.raises(ConfigError, match=f"rope_scaling type '{kind}' is not supported; supported: default, linear"):
        parse({"rope_type": kind, "factor": 2.0})


@pytest.mark.parametrize(
    ("scaling", "option"),
    [
        ({"rope_type": "default", "factor": 2.0}, "factor"),
        ({"rope_type": "linear", "factor": 2.0, "beta_fast": 32}, "beta_fast"),
        ({"rope_type": "yarn", "factor": 2.0, "short_factor": [1.0]}, "short_factor"),
        (LLAMA3 | {"mrope_section": [16, 24, 24]}, "mrope_section"),
    ],
)
def test_an_option_that_the_kind_does_not_have_is_refused_by_name(scaling: dict[str, Any], option: str) -> None:
    with pytest.raises(ConfigError, match=f"rope_scaling option '{option}' is not supported for type"):
        parse(scaling)


@pytest.mark.parametrize(
    ("kind", "option"),
    [
        ("linear", "factor"),
        ("dynamic", "factor"),
        ("yarn", "factor"),
        *(("llama3", name) for name in LLAMA3 if name != "rope_type"),
    ],
)
def test_a_missing_option_is_refused_by_name(kind: str, option: str) -> None:
    scaling = (LLAMA3 if kind == "llama3" else {"factor": 2.0}) | {"rope_type": kind}
    for value in ({}, {option: None}):
        incomplete = {name: given for name, given in scaling.items() if name != option} | value
        with pytest.raises(ConfigError, match=f"rope_scaling option '{option}' is missing for type '{kind}'"):
            parse(incomplete)


@pytest.mark.parametrize("scaling", ["linear", ["linear"], 2])
def test_a_scaling_that_is_no_object_is_refused(scaling: Any) -> None:
    with pytest.raises(ConfigError, match=r"rope_scaling=.* must be an object"):
        parse(scaling)


@pytest.mark.parametrize("value", ["two", "2.0", True, [2.0], 0, -2.0, float("nan"), float("inf")])
def test_an_option_that_is_no_positive_number_is_refused_by_name(value: Any) -> None:
    with pytest.raises(ConfigError, match="rope_scaling option 'factor'"):
        parse({"rope_type": "linear", "factor": value})


@pytest.mark.parametrize("value", ["64", 0, -1, 64.5, True])
def test_an_original_context_that_is_no_positive_integer_is_refused_by_name(value: Any) -> None:
    with pytest.raises(ConfigError, match="original_max_position_embeddings"):
        parse(LLAMA3 | {"original_max_position_embeddings": value})


def test_default_frequencies_are_powers_of_theta() -> None:
    inverse = parse(head_dim=8, rope_theta=100.0).inverse_frequencies()
    np.testing.assert_allclose(inverse, [1.0, 100**-0.25, 0.1, 100**-0.75], rtol=1e-6)
    assert inverse.dtype == np.float32


def test_linear_scaling_divides_positions() -> None:
    cos, sin = tables(parse({"type": "linear", "factor": 4.0}), [0, 4, 400], context=512)
    plain_cos, plain_sin = tables(parse(), [0, 1, 100], context=512)
    np.testing.assert_allclose(cos, plain_cos, atol=1e-5)
    np.testing.assert_allclose(sin, plain_sin, atol=1e-5)


def test_llama3_keeps_short_waves_stretches_long_ones_and_blends_between() -> None:
    plain = parse().inverse_frequencies().astype(np.float64)
    scaled = parse(LLAMA3).inverse_frequencies().astype(np.float64)
    waves = 2 * math.pi / plain
    short, long = waves < 64 / 4.0, waves > 64 / 1.0
    assert short.any()
    assert long.any()
    np.testing.assert_allclose(scaled[short], plain[short], rtol=1e-6)
    np.testing.assert_allclose(scaled[long], plain[long] / 8.0, rtol=1e-6)
    between = ~short & ~long
    assert between.any()
    assert np.all((scaled[between] < plain[between]) & (scaled[between] > plain[between] / 8.0))


def test_yarn_keeps_high_frequencies_and_interpolates_low_ones() -> None:
    plain = parse(head_dim=64).inverse_frequencies().astype(np.float64)
    rope = parse({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}, head_dim=64)
    ratio = plain / rope.inverse_frequencies()
    assert ratio[0] == pytest.approx(1.0)
    assert ratio[-1] == pytest.approx(4.0)
    assert np.all(np.diff(ratio) >= -1e-6)
    assert np.any((ratio > 1.1) & (ratio < 3.9))


@pytest.mark.parametrize(("truncate", "first", "last"), [(True, 4, 8), (False, 4.5, 7.5)])
def test_yarn_blends_between_the_dimensions_that_turn_beta_fast_and_beta_slow_times(
    truncate: bool, first: float, last: float
) -> None:
    dim, theta, original = 32, 10000.0, 4096
    # The dimension that turns n times within the original context is dim * log(original / 2 pi n) / (2 log theta).
    fast, slow = (original / (2 * math.pi) * theta ** (-2 * at / dim) for at in (4.5, 7.5))
    scaling = {"rope_type": "yarn", "factor": 4.0, "beta_fast": fast, "beta_slow": slow, "truncate": truncate}
    rope = parse(scaling | {"original_max_position_embeddings": original}, head_dim=dim)
    plain = parse(head_dim=dim).inverse_frequencies().astype(np.float64)
    share = np.clip((np.arange(dim // 2) - first) / (last - first), 0, 1)
    np.testing.assert_allclose(rope.inverse_frequencies(), plain * (1 - share) + plain / 4.0 * share, rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 0.1 * math.log(4.0) + 1.0),
        ({"attention_factor": 1.5}, 1.5),
        ({"mscale": 2.0, "mscale_all_dim": 0.5}, (0.2 * math.log(4.0) + 1.0) / (0.05 * math.log(4.0) + 1.0)),
        ({"mscale": 2.0}, 0.1 * math.log(4.0) + 1.0),
    ],
)
def test_yarn_scales_cosine_and_sine(options: dict[str, float], expected: float) -> None:
    rope = parse({"rope_type": "yarn", "factor": 4.0, **options})
    assert rope.attention_scaling() == pytest.approx(expected)
    cos, sin = tables(rope, [0, 17], context=64)
    np.testing.assert_allclose(cos**2 + sin**2, expected**2, rtol=1e-5)


def test_only_yarn_changes_the_amplitude() -> None:
    for scaling in (None, {"type": "linear", "factor": 4.0}, {"type": "dynamic", "factor": 4.0}, LLAMA3):
        assert parse(scaling).attention_scaling() == 1.0


def test_dynamic_scaling_starts_beyond_the_original_context_and_follows_each_rows_length() -> None:
    rope = parse({"type": "dynamic", "factor": 2.0}, max_positions=64)
    within, _ = tables(rope, [1, 63], context=64)
    np.testing.assert_array_equal(within, tables(rope, [1, 63], context=10)[0])
    np.testing.assert_allclose(within, tables(parse(), [1, 63], context=64)[0], atol=1e-5)
    stretched = RopeConfig("default", 10000.0 * (2.0 * 96 / 64 - 1.0) ** (32 / 30), 32, 64)
    np.testing.assert_allclose(
        tables(rope, [1, 63], context=96)[0], tables(stretched, [1, 63], context=0)[0], atol=1e-5
    )
    lengths = jnp.array([64, 96], jnp.int32)
    mixed, _ = rope_tables(rope, jnp.array([63, 63], jnp.int32), lengths)
    np.testing.assert_array_equal(np.asarray(mixed)[0], within[1])
    np.testing.assert_array_equal(np.asarray(mixed)[1], tables(rope, [63], context=96)[0][0])


def test_rotation_pairs_the_two_halves_and_depends_on_distance_alone() -> None:
    rope = parse(head_dim=16)
    rng = np.random.default_rng(0)
    query, key = rng.normal(size=(2, 16)).astype(np.float32)

    def rotate(vector: np.ndarray, position: int) -> np.ndarray:
        cos, sin = rope_tables(rope, jnp.array([position], jnp.int32), jnp.array([1], jnp.int32))
        return np.asarray(apply_rope(jnp.asarray(vector)[None, None], cos, sin))[0, 0]

    angles = 5 * rope.inverse_frequencies().astype(np.float64)
    expected = (query[:8] + 1j * query[8:]) * np.exp(1j * angles)
    np.testing.assert_allclose(rotate(query, 5), np.concatenate([expected.real, expected.imag]), atol=1e-5)
    near, far = rotate(query, 7) @ rotate(key, 3), rotate(query, 104) @ rotate(key, 100)
    assert near == pytest.approx(far, abs=1e-3)
    assert near != pytest.approx(rotate(query, 7) @ rotate(key, 4), abs=1e-2)


def test_rotation_is_computed_in_float32_and_keeps_the_dtype() -> None:
    rope = parse(head_dim=16)
    cos, sin = rope_tables(rope, jnp.array([1000], jnp.int32), jnp.array([1], jnp.int32))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 2, 16)), jnp.bfloat16)
    rotated = apply_rope(x, cos, sin)
    assert rotated.dtype == jnp.bfloat16
    exact = apply_rope(x.astype(jnp.float32), cos, sin)
    np.testing.assert_array_equal(np.asarray(rotated), np.asarray(exact.astype(jnp.bfloat16)))


@pytest.mark.parametrize(
    ("options", "scaling"),
    [
        ({}, 1.138629436111989),
        ({"attn_factor": 1.0}, 1.138629436111989),
        ({"attn_factor": 1, "extrapolation_factor": 1.0, "finetuned": True}, 1.138629436111989),
        ({"attention_factor": 1.3}, 1.3),
        ({"attention_factor": 1.3, "mscale": 0.707, "mscale_all_dim": 1.0}, 1.3),
        ({"mscale": 0.707, "mscale_all_dim": 1.0}, 0.964326914892074),
        ({"mscale": 1.0, "mscale_all_dim": 1.0}, 1.0),
        ({"mscale": 0.707}, 1.138629436111989),
        ({"mscale": 1.0, "mscale_all_dim": 0}, 1.138629436111989),
    ],
)
def test_yarn_is_what_transformers_makes_of_its_options(options: dict[str, Any], scaling: float) -> None:
    """Values of LlamaRotaryEmbedding, the same in transformers 4.57.1 and 5.24.0."""
    rope = parse({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, **options})
    assert rope.attention_scaling() == pytest.approx(scaling, rel=1e-12)
    expected = [1.0, 0.039999999, 0.007905695, 0.0025, 4.4457e-05]
    np.testing.assert_allclose(rope.inverse_frequencies()[[0, 4, 6, 8, 15]], expected, rtol=1e-6)


@pytest.mark.parametrize(
    "options",
    [{"attn_factor": 2.0}, {"attn_factor": True}, {"extrapolation_factor": 0.5}, {"partial_rotary_factor": 0.5}],
)
def test_an_option_on_which_programs_disagree_is_refused_unless_it_says_nothing(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(ConfigError, match=f"rope_scaling option {name}=.* is not supported; it must be 1"):
        parse({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, **options})


@pytest.mark.parametrize("kind", ["default", "linear"])
def test_an_original_context_changes_nothing_where_transformers_does_not_read_it(kind: str) -> None:
    factor = {} if kind == "default" else {"factor": 2.0}
    scaling = {"rope_type": kind, **factor}
    assert parse(scaling | {"original_max_position_embeddings": 64}) == parse(scaling)


def test_two_fields_that_describe_the_positions_differently_are_refused_with_both_values() -> None:
    raw = {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}
    agreed = parse_rope(raw | {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}}, 32, 256)
    assert (agreed.kind, agreed.theta) == ("linear", 5e5)
    with pytest.raises(ConfigError, match=r"give 'factor' as 2\.0 and as 4\.0: keep the one"):
        parse_rope(raw | {"rope_parameters": {"rope_type": "linear", "factor": 4.0}}, 32, 256)
