"""The device programs of a step: backbone (by tokens), head and score (by rows). Pure functions of arrays.

Each is written for one rank and mapped over a group's mesh. A decoder layer has exactly two all-reduces.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import Mesh, PartitionSpec

from fly_jax.device.device_arrays import BY_RANK
from fly_jax.device.sampling import SamplingRows, results, sample, scores
from fly_jax.device.step_upload import BackboneShape, sampling_layout, scoring_layout
from fly_jax.models.llama import Decoder, LMHead
from fly_jax.models.sharding import TP_AXIS, ModelSpec
from fly_jax.scheduling.step import TILE_TOKENS
from kernels_pallas import AttentionBackend, AttentionOptions, KVLayout, QueryRuns

_REPLICATED = PartitionSpec()


@dataclass(frozen=True)
class BackboneInputs:
    """One rank's step metadata inside a program; see :func:`fly_jax.device.step_upload.pack_backbone`."""

    tokens: Array
    positions: Array
    context_lengths: Array
    token_rows: Array
    row_slots: Array
    sample_places: Array
    num_decodes: Array
    tables: Array


@dataclass(frozen=True)
class PagedPool:
    """How a group's programs read and write its pools."""

    backend: AttentionBackend
    layout: KVLayout


class PagedAttend:
    """The decoder's attention over this rank's pool; ``pool`` is rebound as layers write to it."""

    def __init__(
        self, spec: ModelSpec, attention: PagedPool, shape: BackboneShape, pool: Array, inputs: BackboneInputs
    ) -> None:
        self.attention, self.shape, self.pool, self.inputs = attention, shape, pool, inputs
        self.options = [AttentionOptions(spec.config.head_dim**-0.5, window) for window in spec.config.sliding_windows]
        block_tokens = attention.layout.block_tokens
        blocks = inputs.tables[inputs.token_rows, jnp.maximum(inputs.positions, 0) // block_tokens]
        self.blocks = jnp.where(inputs.positions >= 0, blocks, pool.shape[0])
        self.offsets = jnp.maximum(inputs.positions, 0) % block_tokens

    def __call__(self, layer: int, query: Array, key: Array, value: Array) -> Array:
        backend, layout = self.attention.backend, self.attention.layout
        self.pool = backend.write_kv(self.pool, layer, key, value, self.blocks, self.offsets, layout)
        rows = min(self.shape.rows, self.shape.tokens)
        decoded = self._attend(layer, query[:rows, None], self._decodes(rows))[:, 0]
        if not self.shape.mixed:
            return decoded
        tiles = self.shape.tokens // TILE_TOKENS
        tiled = self._attend(layer, query.reshape(tiles, TILE_TOKENS, *query.shape[1:]), self._tiles(tiles))
        is_decode = jnp.arange(self.shape.tokens) < self.inputs.num_decodes[0]
        decoded = jnp.pad(decoded, ((0, self.shape.tokens - rows), (0, 0), (0, 0), (0, 0)))
        return jnp.where(is_decode[:, None, None, None], decoded, tiled.reshape(query.shape))

    def _decodes(self, rows: int) -> QueryRuns:
        """Places that are request rows of one token each."""
        inputs, row = self.inputs, jnp.arange(rows, dtype=jnp.int32)
        lengths = (row < inputs.num_decodes[0]).astype(jnp.int32)
        return QueryRuns(inputs.tables, row, inputs.positions[:rows], lengths)

    def _tiles(self, tiles: int) -> QueryRuns:
        """Places in tiles, each a run of one request's prompt."""
        inputs, first_place = self.inputs, jnp.arange(tiles) * TILE_TOKENS
        positions = inputs.positions.reshape(tiles, TILE_TOKENS)
        counts = jnp.sum(positions >= 0, axis=1, dtype=jnp.int32)
        lengths = jnp.where(first_place >= inputs.num_decodes[0], counts, 0)
        return QueryRuns(inputs.tables, inputs.token_rows[first_place], positions[:, 0], lengths)

    def _attend(self, layer: int, query: Array, runs: QueryRuns) -> Array:
        layout = self.attention.layout
        return self.attention.backend.paged_attention(query, self.pool, layer, runs, layout, self.options[layer])


def backbone(
    spec: ModelSpec, attention: PagedPool, shape: BackboneShape, mesh: Mesh
) -> Callable[..., tuple[Array, ...]]:
    """``(leaves, pool, token_tables, packed) -> (pool, hidden, sample_hidden)``.

    ``pool [ranks * num_blocks, elements]`` is donated; ``token_tables [ranks, slots]`` holds each slot's latest
    sampled token, the same on every rank; ``hidden [tokens, embed]`` and ``sample_hidden [sample_rows, embed]`` are
    normalised.
    """

    def rank_step(leaves: tuple[Array, ...], pool: Array, token_tables: Array, packed: Array) -> tuple[Array, ...]:
        inputs = BackboneInputs(**shape.layout.unpack(packed[0]))
        from_device = token_tables[0, inputs.row_slots[inputs.token_rows]]
        tokens = jnp.where(inputs.tokens < 0, from_device, inputs.tokens)
        attend = PagedAttend(spec, attention, shape, pool, inputs)
        decoder = cast(Decoder, spec.decoder.merge(leaves))
        positions = jnp.maximum(inputs.positions, 0)
        hidden = decoder(tokens, positions, inputs.context_lengths, attend, _reduce(mesh))
        return attend.pool, hidden, hidden[inputs.sample_places]

    weights = tuple(parameter.partition for parameter in spec.decoder.parameters)
    return jax.shard_map(
        rank_step,
        mesh=mesh,
        in_specs=(weights, BY_RANK, BY_RANK, BY_RANK),
        out_specs=(BY_RANK, _REPLICATED, _REPLICATED),
        check_vma=False,
    )


def head(spec: ModelSpec, rows: int, mesh: Mesh) -> Callable[..., tuple[Array, Array]]:
    """``(leaves, sample_hidden, token_tables, packed) -> (token_tables, results)``; samples the first ``rows`` rows."""

    def rank_step(leaves: tuple[Array, ...], hidden: Array, tables: Array, packed: Array) -> tuple[Array, Array]:
        columns = sampling_layout(rows).unpack(packed[0])
        logits = _gather_logits(spec, mesh, leaves, hidden[:rows])
        tokens = sample(logits, SamplingRows.of(columns))
        tables = tables.at[0, columns["slots"]].set(tokens)
        return tables, results(logits, tokens, columns["top_logprobs"])

    weights = tuple(parameter.partition for parameter in spec.head.parameters)
    return jax.shard_map(
        rank_step,
        mesh=mesh,
        in_specs=(weights, _REPLICATED, BY_RANK, _REPLICATED),
        out_specs=(BY_RANK, _REPLICATED),
        check_vma=False,
    )


def score(spec: ModelSpec, tokens: int, mesh: Mesh) -> Callable[..., tuple[Array, Array]]:
    """``(leaves, hidden [tokens, embed], packed) -> (own, alternatives)``; see :func:`.sampling.scores`."""

    def rank_step(leaves: tuple[Array, ...], hidden: Array, packed: Array) -> tuple[Array, Array]:
        columns = scoring_layout(tokens).unpack(packed[0])

        def score_tile(tile: tuple[Array, Array, Array]) -> tuple[Array, Array]:
            return scores(_gather_logits(spec, mesh, leaves, tile[0]), tile[1], tile[2])

        # Tile by tile: the logits of all places at once would take tokens * vocabulary * 4 bytes.
        by_tile = [columns[name].reshape(-1, TILE_TOKENS) for name in ("targets", "top_logprobs")]
        tiles = (hidden.reshape(-1, TILE_TOKENS, hidden.shape[-1]), *by_tile)
        own, others = lax.map(score_tile, tiles)
        return own.reshape(tokens, -1), others.reshape(tokens, -1)

    weights = tuple(parameter.partition for parameter in spec.head.parameters)
    outputs = (_REPLICATED, _REPLICATED)
    return jax.shard_map(
        rank_step, mesh=mesh, in_specs=(weights, _REPLICATED, _REPLICATED), out_specs=outputs, check_vma=False
    )


def _reduce(mesh: Mesh) -> Callable[[Array], Array]:
    if mesh.size == 1:
        return lambda x: x
    return lambda x: lax.psum(x, TP_AXIS)


def _gather_logits(spec: ModelSpec, mesh: Mesh, leaves: tuple[Array, ...], hidden: Array) -> Array:
    """Float32 logits over the real vocabulary, the same on every rank: ``[rows, vocab_size]``."""
    logits = cast(LMHead, spec.head.merge(leaves))(hidden)
    if mesh.size > 1:
        logits = lax.all_gather(logits, TP_AXIS, axis=1, tiled=True)
    return logits[:, : spec.config.vocab_size]
