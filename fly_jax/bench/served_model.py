"""What a server says of the model that it serves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import httpx

from fly_jax.errors import ConfigError

# Status of servers that have completions but no list of models.
NO_SUCH_PLACE = (404, 405, 501)


@dataclass(frozen=True, slots=True)
class ServedModel:
    """``max_model_len`` is None where the server does not say."""

    name: str
    max_model_len: int | None


def served_model(base_url: str, name: str | None, headers: Mapping[str, str]) -> ServedModel:
    """The model of that name; without one, the server's first. A server that lists no models is believed to have it.

    Raises:
        ConfigError: the server cannot be reached, lists other models, or none and no name is given.
    """
    try:
        answer = httpx.get(f"{base_url.rstrip('/')}/v1/models", headers=dict(headers), timeout=60, trust_env=False)
        if name is not None and answer.status_code in NO_SUCH_PLACE:
            return ServedModel(name, None)
        answer.raise_for_status()
        cards: list[dict[str, Any]] = answer.json()["data"]
        cards_by_name = {str(card["id"]): card for card in cards}
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"{base_url} does not list its models ({reason}): check --base-url and --api-key, or give --model"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{base_url}/v1/models is not a list of models: check --base-url") from error
    if name is None and cards_by_name:
        name = next(iter(cards_by_name))
    if name not in cards_by_name:
        raise ConfigError(f"{base_url} does not serve {name!r}, only {', '.join(cards_by_name) or 'nothing'}")
    length = cards_by_name[name].get("max_model_len")
    return ServedModel(name, length if isinstance(length, int) else None)
