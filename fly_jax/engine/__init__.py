"""The step loop, the thread that owns it, and what is decided before it starts."""
