"""Maps the logical axes that parameters name to the mesh: the whole sharding of the engine in one table."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from fly_jax.models.config import ModelConfig
from fly_jax.models.llama import Decoder, LMHead
from fly_jax.models.partition import Partition

TP_AXIS = "tp"

# Sharded axes are always the first of their parameter, so that a TP shard is one contiguous byte range.
AXIS_RULES: dict[str, str | None] = {
    "qkv": TP_AXIS,
    "heads": TP_AXIS,
    "gate_up": TP_AXIS,
    "ffn": TP_AXIS,
    "vocab": TP_AXIS,
    "vocab_table": None,  # the embedding table is read locally by every device: no collective for it
    "embed": None,
    "head_dim": None,
}


@dataclass(frozen=True)
class ParameterSpec:
    """One leaf of a module.

    Attributes:
        name: dotted path, such as ``layers.0.attention.qkv``; the key in a prepared checkpoint.
        buffer: name of the resident buffer that it views (a tied LM head views ``embedding``).
    """

    name: str
    shape: tuple[int, ...]
    dtype: jnp.dtype
    partition: PartitionSpec
    buffer: str

    @property
    def sharded(self) -> bool:
        return self.partition != PartitionSpec()

    @property
    def nbytes(self) -> int:
        return jnp.dtype(self.dtype).itemsize * math.prod(self.shape)


@dataclass(frozen=True)
class ModuleSpec:
    """A module split into its static graph and its leaves, flattened once."""

    graph: nnx.GraphDef
    treedef: jax.tree_util.PyTreeDef
    parameters: tuple[ParameterSpec, ...]

    def merge(self, leaves: tuple[jax.Array, ...]) -> nnx.Module:
        """The module over these leaves (any shard of them), in ``parameters`` order."""
        return nnx.merge(self.graph, jax.tree.unflatten(self.treedef, leaves))


@dataclass(frozen=True)
class ModelSpec:
    """The decoder and its head, as shapes, and where each parameter lives."""

    config: ModelConfig
    partition: Partition
    dtype: jnp.dtype
    decoder: ModuleSpec
    head: ModuleSpec

    @property
    def buffers(self) -> dict[str, ParameterSpec]:
        """The resident buffers by name; a tied head has none of its own."""
        specs = (*self.decoder.parameters, *self.head.parameters)
        return {spec.buffer: spec for spec in reversed(specs) if spec.buffer == spec.name}


def model_spec(config: ModelConfig, max_tp: int, dtype: jnp.dtype) -> ModelSpec:
    """Shapes, axes and buffers of a model prepared for degrees up to ``max_tp``."""
    part = Partition.of(config, max_tp)
    decoder = _module_spec(Decoder(config, part, dtype), prefix="")
    head = _module_spec(LMHead(config, part, dtype), prefix="lm_head.")
    if config.tie_embeddings:
        tied = tuple(replace(spec, buffer="embedding") for spec in head.parameters)
        head = ModuleSpec(head.graph, head.treedef, tied)
    return ModelSpec(config, part, jnp.dtype(dtype), decoder, head)


def _module_spec(module: nnx.Module, prefix: str) -> ModuleSpec:
    graph, state = nnx.split(module)
    shapes, treedef = jax.tree_util.tree_flatten(state)
    variables = nnx.to_flat_state(state)
    parameters = []
    for (path, variable), shape in zip(variables, shapes, strict=True):
        mapped = [AXIS_RULES[axis] for axis in variable.get_metadata("logical_axes")]
        partition = PartitionSpec(*mapped) if any(mapped) else PartitionSpec()
        name = prefix + ".".join(str(part) for part in path)
        parameters.append(ParameterSpec(name, shape.shape, shape.dtype, partition, buffer=name))
    return ModuleSpec(graph, treedef, tuple(parameters))
