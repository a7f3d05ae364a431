"""``python -m fly_jax.bench``: what serving, and switching while serving, costs."""
