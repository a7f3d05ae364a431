"""The one int32 upload of a step: what goes into it on the host, and how a program takes it apart."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from fly_jax.kv.blocks import KVCacheSpec
from fly_jax.scheduling.request import MAX_MASKED_TOKENS
from fly_jax.scheduling.step import ScheduledRow, StepPlan

if TYPE_CHECKING:
    from jax import Array

AnyArray = TypeVar("AnyArray", "Array", np.ndarray)

# Context positions that one iteration of the attention loop covers; block tables are padded to whole iterations.
CHUNK_TOKENS = 128
# Fills up a row's list of token ids; past every vocabulary.
NO_TOKEN = 2**31 - 1


@dataclass(frozen=True)
class PackedLayout:
    """Named int32 arrays laid end to end in one row a rank."""

    fields: tuple[tuple[str, tuple[int, ...]], ...]

    @property
    def size(self) -> int:
        return sum(math.prod(shape) for _, shape in self.fields)

    def pack(self, ranks: int, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        """``int32 [ranks, size]``; an array without a rank axis is repeated for every rank."""
        out = np.empty((ranks, self.size), np.int32)
        offset = 0
        for name, shape in self.fields:
            size = math.prod(shape)
            array = arrays[name]
            out[:, offset : offset + size] = (
                array.reshape(ranks, size) if array.ndim > len(shape) else array.reshape(size)
            )
            offset += size
        return out

    def unpack(self, row: AnyArray) -> dict[str, AnyArray]:
        """The arrays again, from one rank's ``int32 [size]``, inside a program or on the host."""
        arrays, offset = {}, 0
        for name, shape in self.fields:
            size = math.prod(shape)
            arrays[name] = row[offset : offset + size].reshape(shape)
            offset += size
        return arrays


@dataclass(frozen=True)
class BackboneShape:
    """Static sizes of one backbone program.

    Attributes:
        tokens: token places. In a decode step place i is request row i; in a mixed step decodes come first,
            then prompt chunks from the next whole tile on.
        rows: request rows.
        table_blocks: width of a block table.
        sample_rows: rows handed to the head, the same in every program so that heads fit all backbones.
        mixed: whether there are prompt chunks.
    """

    tokens: int
    rows: int
    table_blocks: int
    sample_rows: int
    mixed: bool

    @property
    def layout(self) -> PackedLayout:
        return PackedLayout(
            (
                ("tokens", (self.tokens,)),
                ("positions", (self.tokens,)),
                ("context_lengths", (self.tokens,)),
                ("token_rows", (self.tokens,)),
                ("row_slots", (self.rows,)),
                ("sample_places", (self.sample_rows,)),
                ("num_decodes", (1,)),
                ("tables", (self.rows, self.table_blocks)),
            )
        )


def table_width(kv: KVCacheSpec, max_model_len: int, tp: int) -> int:
    """Blocks of a table that holds ``max_model_len`` tokens, in whole attention chunks."""
    per_chunk = chunk_blocks(kv, tp)
    return -(-kv.blocks_for(max_model_len, tp) // per_chunk) * per_chunk


def chunk_blocks(kv: KVCacheSpec, tp: int) -> int:
    """Blocks that one iteration of the attention loop reads."""
    return max(1, CHUNK_TOKENS // kv.block_tokens(tp))


def pack_backbone(plan: StepPlan, shape: BackboneShape) -> np.ndarray:
    """The upload of a backbone step, ``int32 [ranks, layout.size]``.

    Pad places have position -1 (nothing is written for them); a token that the host does not know yet is -1
    and is read from the device-side token table at its row's slot.
    """
    ranks = plan.group.num_devices
    tokens, positions = np.zeros(shape.tokens, np.int32), np.full(shape.tokens, -1, np.int32)
    lengths, token_rows = np.ones(shape.tokens, np.int32), np.zeros(shape.tokens, np.int32)
    slots = np.zeros(shape.rows, np.int32)
    sample_places = np.zeros(shape.sample_rows, np.int32)
    tables = np.zeros((ranks, shape.rows, shape.table_blocks), np.int32)
    sampled = 0
    for index, (row, place) in enumerate(zip(plan.rows, plan.places, strict=True)):
        request, span = row.request, slice(place, place + row.count)
        steps = np.arange(row.start, row.start + row.count)
        tokens[span] = [request.token_at(position) for position in range(row.start, row.start + row.count)]
        positions[span] = steps
        lengths[span] = np.maximum(steps + 1, len(request.prompt_ids))
        token_rows[span] = index
        slots[index] = row.slot
        assert request.table is not None
        tables[:, index, : request.table.num_blocks] = request.table.rows
        if row.samples:
            sample_places[sampled] = place + row.count - 1
            sampled += 1
    arrays = {
        "tokens": tokens, "positions": positions, "context_lengths": lengths, "token_rows": token_rows,
        "row_slots": slots, "sample_places": sample_places, "num_decodes": np.array([len(plan.decodes)]),
        "tables": tables,
    }  # fmt: skip
    return shape.layout.pack(ranks, arrays)


def sampling_layout(rows: int) -> PackedLayout:
    """The upload of a head step of this many rows; floats travel as their bits."""
    names = ("slots", "temperature", "top_k", "top_p", "min_p", "seed_high", "seed_low", "draw", "top_logprobs")
    return PackedLayout((*((name, (rows,)) for name in names), ("masked_tokens", (rows, MAX_MASKED_TOKENS))))


def pack_sampling(rows: tuple[ScheduledRow, ...], bucket: int, pad_slot: int) -> np.ndarray:
    """``int32 [1, size]``: sampling options of the rows; pad rows are greedy and write to ``pad_slot``."""
    columns = {name: np.zeros(shape, np.int32) for name, shape in sampling_layout(bucket).fields}
    columns["slots"][:] = pad_slot
    columns["masked_tokens"][:] = NO_TOKEN
    columns["top_p"][:] = np.ones(bucket, np.float32).view(np.int32)
    used, options = slice(len(rows)), [row.request.params for row in rows]
    # The draw is numbered by the token's position among the outputs, so no batch or layout changes it.
    draws = [row.start + row.count - len(row.request.prompt_ids) for row in rows]
    seeds = np.array([row.request.seed for row in rows], np.uint64)
    # Column by column: row by row, 16 rows took 3 times as long and 256 took 12 times.
    columns["slots"][used] = [row.slot for row in rows]
    columns["top_k"][used] = [max(0, each.top_k) for each in options]
    columns["seed_high"][used] = (seeds >> 32).astype(np.uint32).view(np.int32)
    columns["seed_low"][used] = seeds.astype(np.uint32).view(np.int32)
    columns["draw"][used] = draws
    columns["top_logprobs"][used] = [each.logprobs or 0 for each in options]
    for name in ("temperature", "top_p", "min_p"):
        columns[name][used] = np.array([getattr(each, name) for each in options], np.float32).view(np.int32)
    for index, (row, draw) in enumerate(zip(rows, draws, strict=True)):
        if masked := row.request.masked_tokens(draw):
            columns["masked_tokens"][index, : len(masked)] = masked
    return sampling_layout(bucket).pack(1, columns)


def scoring_layout(tokens: int) -> PackedLayout:
    """The upload of a score step of this many places."""
    return PackedLayout((("targets", (tokens,)), ("top_logprobs", (tokens,))))


def pack_scoring(plan: StepPlan, tokens: int) -> np.ndarray:
    """``int32 [1, size]``: at each scored place the token that follows it in the prompt, elsewhere 0."""
    targets, alternatives = np.zeros(tokens, np.int32), np.zeros(tokens, np.int32)
    for row, place in zip(plan.rows, plan.places, strict=True):
        if row.scores:
            follow = row.request.prompt_ids[row.start + 1 : row.start + row.count + 1]
            targets[place : place + len(follow)] = follow
            alternatives[place : place + len(follow)] = row.request.params.prompt_logprobs or 0
    return scoring_layout(tokens).pack(1, {"targets": targets, "top_logprobs": alternatives})
