"""Devices are configured before anything imports jax; hypothesis draws the same examples in every run."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

from fly_jax.platform import configure_devices

configure_devices(4)

settings.register_profile(
    "deterministic", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("deterministic")
