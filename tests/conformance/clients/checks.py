"""What the clients' programs share: where the server is, and the prompts whose answers are known.

Imported by programs that run with another environment's Python, so it needs the standard library alone.
"""

from __future__ import annotations

import sys

MODEL = "demo"
# The bundled model recalls facts of its prompt.
FACTS = "- Mira: red kite\n- Tom: old drum\n"
PROMPT = f"{FACTS}Question: What does Mira have? Answer:"
ANSWER = " red kite"
QUESTION = f"{FACTS}What does Mira have?"
# More than the 1024 tokens of its context.
TOO_LONG = "Once upon a time there was a fox. " * 300


def server_url() -> str:
    """The server's address, from the command line, without ``/v1``."""
    [url] = sys.argv[1:]
    return url


def expect(what: str, found: object, wanted: object) -> None:
    """Ends the program with both values unless they are equal."""
    if found != wanted:
        raise SystemExit(f"{what}: expected {wanted!r}, got {found!r}")
