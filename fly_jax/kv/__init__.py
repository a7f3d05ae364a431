"""KV memory: blocks, who holds them, and what of them moves. Pure Python, no JAX."""
