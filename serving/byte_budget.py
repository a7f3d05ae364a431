"""How many bytes of clients' bodies there may be at once, in all and of one client."""

from __future__ import annotations

from collections import Counter
from types import TracebackType

from fly_jax.errors import ClientQueueFullError, QueueFullError

# Of all bytes, that one client's bodies may be, so that there is always room for another's.
CLIENT_SHARE = 0.5


class ByteBudget:
    """
    Args:
        most: bytes; what comes beyond is refused, and of one client beyond its share.
        what: is done with the bodies, as in "bodies wait to be read".
    """

    def __init__(self, most: int, what: str) -> None:
        self.most, self.what = most, what
        self.held: Counter[str] = Counter()

    @property
    def total(self) -> int:
        return self.held.total()

    def body(self, client: str) -> HeldBody:
        """One body, which holds nothing yet."""
        return HeldBody(self, client)

    def check(self, size: int, client: str, own: int) -> None:
        """Whether a body of ``own`` bytes may have ``size`` more.

        Raises:
            QueueFullError, ClientQueueFullError: it may not, now.
        """
        if self.total + size > self.most:
            raise QueueFullError(
                f"{self.total} bytes of {self.what}, and with {size} more they would be over {self.most}: try later"
            )
        # A client's only body may be of any size, up to all that there is.
        held, share = self.held[client], int(CLIENT_SHARE * self.most)
        if held > own and held + size > share:
            raise ClientQueueFullError(
                f"{held} bytes of your {self.what}, and with {size} more they would be over {share}: try later"
            )


class HeldBody:
    """What one body holds of a budget, until it is released or the block ends."""

    def __init__(self, budget: ByteBudget, client: str) -> None:
        self._budget, self._client = budget, client
        self._size = 0

    def grow(self, size: int) -> None:
        """
        Raises:
            QueueFullError, ClientQueueFullError: there is no room; nothing more is held.
        """
        if not size:  # most bodies hold nothing
            return
        self._budget.check(size, self._client, self._size)
        self._size += size
        self._budget.held[self._client] += size

    def release(self) -> None:
        """Gives back all that is held, if anything: called with every part of a streamed answer."""
        if not self._size:
            return
        held = self._budget.held
        held[self._client] -= self._size
        self._size = 0
        if not held[self._client]:
            del held[self._client]  # clients come and go for as long as a server runs

    def __enter__(self) -> HeldBody:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
