"""The ``fly-jax`` command."""
