"""How loading and converting report what they have done."""

from collections.abc import Callable

Progress = Callable[[int, int], None]
"""Called from the loading thread with the bytes done so far and the bytes in all."""
