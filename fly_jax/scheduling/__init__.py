"""Who runs, waits and gives way. Pure Python, no JAX."""
