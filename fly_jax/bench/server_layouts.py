"""Reading and setting the layout and the policy of a running fly-jax server."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import httpx

from fly_jax.bench import terminal
from fly_jax.errors import ConfigError
from fly_jax.policy.names import AUTO, STATIC

SWITCH_TIMEOUT_SECONDS = 300
# Nobody who has pressed Ctrl-C waits longer for a server that hangs.
RESTORE_TIMEOUT_SECONDS = 60


@dataclass(frozen=True, slots=True)
class Configuration:
    """What a run is made under.

    Attributes:
        layout: the only one, or the one that ``auto`` starts from.
        strategy: of the switches that ``auto`` makes; None: whatever the server was started with.
    """

    layout: str
    policy: str
    strategy: str | None

    def __str__(self) -> str:
        if self.policy == STATIC:
            return self.layout
        return AUTO if self.strategy is None else f"{AUTO} ({self.strategy})"


class ServerLayouts:
    """Reads and sets the layout and the policy of a server."""

    def __init__(self, base_url: str, admin_key: str | None) -> None:
        self._url = f"{base_url}/layout"
        self._headers = {"Authorization": f"Bearer {admin_key}"} if admin_key else {}

    def present(self) -> Configuration:
        """
        Raises:
            ConfigError: the server does not say.
        """
        try:
            answer = httpx.get(self._url, timeout=60, trust_env=False)
            state = answer.raise_for_status().json()
            return Configuration(str(state["layout"]), str(state["policy"]), None)
        except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"GET {self._url} gives no layout ({error!r}): a sweep needs a fly-jax server") from error

    def configure(self, configuration: Configuration) -> bool:
        """Whether the server has such a layout; waits until it is there.

        Raises:
            ConfigError: the server does not answer, or refuses for another reason.
        """
        answer = self._post(configuration, SWITCH_TIMEOUT_SECONDS)
        if answer.status_code == httpx.codes.BAD_REQUEST:
            terminal.say(f"left out {configuration}: {_reason(answer)}")
            return False
        self._require_success(answer, configuration)
        return True

    @contextlib.contextmanager
    def restored(self, found: Configuration) -> Iterator[None]:
        """Brings back, in the end, the layout and the policy that were found.

        Raises:
            ConfigError: the server does not answer, or refuses.
        """
        try:
            yield
        except BaseException:
            # What went wrong first is what the user is told last, and the server may be gone.
            try:
                self._restore(found)
            except ConfigError as error:
                terminal.say(f"layout {found.layout} with policy {found.policy} was not restored: {error}")
            raise
        self._restore(found)

    def _restore(self, found: Configuration) -> None:
        self._require_success(self._post(found, RESTORE_TIMEOUT_SECONDS), found)

    def _post(self, configuration: Configuration, timeout: float) -> httpx.Response:
        body = {"layout": configuration.layout, "policy": configuration.policy}
        try:
            return httpx.post(self._url, json=body, headers=self._headers, timeout=timeout, trust_env=False)
        except httpx.HTTPError as error:
            raise ConfigError(f"POST {self._url} to {configuration} failed ({error!r}): is the server up?") from error

    def _require_success(self, answer: httpx.Response, configuration: Configuration) -> None:
        if not answer.is_success:
            raise ConfigError(f"{self._url} refused {configuration} with {answer.status_code}: {_reason(answer)}")


def _reason(answer: httpx.Response) -> str:
    """A fly-jax server's message; the beginning of what anything in between says."""
    try:
        return str(answer.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return " ".join(answer.text[:200].split())
