"""Which rows of which Hugging Face tensors make up each prepared buffer, in which order.

The orders are those of :mod:`fly_jax.models.llama`. A plan is data: rows that no piece covers are zero padding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from fly_jax.models.config import ModelConfig
from fly_jax.models.sharding import ModelSpec


@dataclass(frozen=True)
class Piece:
    """``rows`` successive rows of ``tensor`` from ``source`` that go to the buffer's rows from ``target``."""

    tensor: str
    source: int
    target: int
    rows: int

    def clip(self, start: int, stop: int) -> Piece | None:
        """The part that lies in the buffer's rows ``[start, stop)``, counted from ``start``; None if there is none."""
        first, last = max(self.target, start), min(self.target + self.rows, stop)
        if first >= last:
            return None
        return Piece(self.tensor, self.source + first - self.target, first - start, last - first)


@dataclass(frozen=True)
class BufferPlan:
    """The pieces of one buffer by ascending target; if ``transposed``, a row of the buffer is a tensor's column."""

    pieces: tuple[Piece, ...]
    transposed: bool = False


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of the Hugging Face checkpoint and its shape; a tied head has none."""
    hidden, head = config.hidden_size, config.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}."
        linears = {
            "self_attn.q_proj": (config.num_heads * head, hidden, config.qkv_bias),
            "self_attn.k_proj": (config.num_kv_heads * head, hidden, config.qkv_bias),
            "self_attn.v_proj": (config.num_kv_heads * head, hidden, config.qkv_bias),
            "self_attn.o_proj": (hidden, config.num_heads * head, config.output_bias),
            "mlp.gate_proj": (config.intermediate_size, hidden, config.mlp_bias),
            "mlp.up_proj": (config.intermediate_size, hidden, config.mlp_bias),
            "mlp.down_proj": (hidden, config.intermediate_size, config.mlp_bias),
        }
        for name, (rows, columns, bias) in linears.items():
            shapes[f"{prefix}{name}.weight"] = (rows, columns)
            if bias:
                shapes[f"{prefix}{name}.bias"] = (rows,)
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{prefix}{name}.weight"] = (hidden,)
        if config.qk_norm:
            shapes |= {f"{prefix}self_attn.{name}.weight": (head,) for name in ("q_norm", "k_norm")}
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    return shapes


def ignored_tensors(config: ModelConfig) -> set[str]:
    """Tensors of older or tied checkpoints that repeat what config.json or the embedding table says.

    A head that differs from the table is none of them: see :func:`checkpoints.model_folder.read_model`.
    """
    ignored = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq" for layer in range(config.num_layers)}
    ignored.add("model.rotary_emb.inv_freq")
    return ignored | {"lm_head.weight"} if config.tie_embeddings else ignored


def plan(spec: ModelSpec) -> dict[str, BufferPlan]:
    """The plan of every buffer of ``spec.buffers``, by its name."""
    plans = {}
    for name in spec.buffers:
        kind, prefix = name, ""
        if name.startswith("layers."):
            _, layer, kind = name.split(".", 2)
            prefix = f"model.layers.{layer}."
        plans[name] = _PLANS[kind](spec, prefix)
    return plans


def _whole(tensor: str, rows: Callable[[ModelConfig], int]) -> Callable[[ModelSpec, str], BufferPlan]:
    return lambda spec, prefix: BufferPlan((Piece(prefix + tensor, 0, 0, rows(spec.config)),))


def _hidden(config: ModelConfig) -> int:
    return config.hidden_size


def _head_dim(config: ModelConfig) -> int:
    return config.head_dim


def _vocab(config: ModelConfig) -> int:
    return config.vocab_size


def _qkv(kind: str) -> Callable[[ModelSpec, str], BufferPlan]:
    """Unit by unit: its query heads, its key head, its value head; ``kind`` is ``weight`` or ``bias``."""

    def heads(spec: ModelSpec) -> Iterator[tuple[str, int]]:
        queries = spec.partition.query_heads_of_unit(spec.config)
        for unit, kv_head in enumerate(spec.partition.kv_head_of_unit(spec.config)):
            yield from (("q_proj", int(head)) for head in queries[unit])
            yield from (("k_proj", int(kv_head)), ("v_proj", int(kv_head)))

    def build(spec: ModelSpec, prefix: str) -> BufferPlan:
        size = spec.config.head_dim
        pieces = (
            Piece(f"{prefix}self_attn.{name}.{kind}", head * size, slot * size, size)
            for slot, (name, head) in enumerate(heads(spec))
            if head >= 0
        )
        return BufferPlan(_merged(pieces))

    return build


def _output(spec: ModelSpec, prefix: str) -> BufferPlan:
    """The output projection's columns in the order of the units' query heads."""
    size, tensor = spec.config.head_dim, f"{prefix}self_attn.o_proj.weight"
    heads = spec.partition.query_heads_of_unit(spec.config).reshape(-1)
    pieces = (Piece(tensor, int(head) * size, slot * size, size) for slot, head in enumerate(heads) if head >= 0)
    return BufferPlan(_merged(pieces), transposed=True)


def _gate_up(kind: str) -> Callable[[ModelSpec, str], BufferPlan]:
    """Chunk pairs ``gate_0, up_0, gate_1, up_1, ...``; the last chunks end early where the FFN is padded."""

    def build(spec: ModelSpec, prefix: str) -> BufferPlan:
        chunk, size = spec.partition.ffn_chunk, spec.config.intermediate_size
        pieces = (
            Piece(f"{prefix}mlp.{name}.{kind}", start, 2 * start + offset, min(chunk, size - start))
            for start in range(0, size, chunk)
            for name, offset in (("gate_proj", 0), ("up_proj", chunk))
        )
        return BufferPlan(_merged(pieces))

    return build


def _down(spec: ModelSpec, prefix: str) -> BufferPlan:
    return BufferPlan((Piece(f"{prefix}mlp.down_proj.weight", 0, 0, spec.config.intermediate_size),), transposed=True)


def _merged(pieces: Iterator[Piece]) -> tuple[Piece, ...]:
    """Joins pieces that go on where the one before them ended, so that big copies stay big."""
    merged: list[Piece] = []
    for piece in pieces:
        last = merged[-1] if merged else None
        if (
            last is not None
            and piece.tensor == last.tensor
            and piece.source == last.source + last.rows
            and piece.target == last.target + last.rows
        ):
            merged[-1] = Piece(last.tensor, last.source, last.target, last.rows + piece.rows)
        else:
            merged.append(piece)
    return tuple(merged)


# By the buffer's name, or for a layer's by what follows ``layers.N.``.
_PLANS: dict[str, Callable[[ModelSpec, str], BufferPlan]] = {
    "embedding": _whole("model.embed_tokens.weight", _vocab),
    "final_norm": _whole("model.norm.weight", _hidden),
    "lm_head.weight": _whole("lm_head.weight", _vocab),
    "attention_norm": _whole("input_layernorm.weight", _hidden),
    "attention.qkv": _qkv("weight"),
    "attention.qkv_bias": _qkv("bias"),
    "attention.query_norm": _whole("self_attn.q_norm.weight", _head_dim),
    "attention.key_norm": _whole("self_attn.k_norm.weight", _head_dim),
    "attention.output": _output,
    "attention.output_bias": _whole("self_attn.o_proj.bias", _hidden),
    "mlp_norm": _whole("post_attention_layernorm.weight", _hidden),
    "mlp.gate_up": _gate_up("weight"),
    "mlp.gate_up_bias": _gate_up("bias"),
    "mlp.down": _down,
    "mlp.down_bias": _whole("mlp.down_proj.bias", _hidden),
}
