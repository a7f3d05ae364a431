"""The parts of ``bench abuse``: what abusers do, and what the others see of it."""
