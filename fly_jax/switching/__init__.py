"""How one layout gives way to another. Pure Python, no JAX."""
