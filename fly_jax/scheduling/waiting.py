"""Waiting requests, and whose turn it is. Pure Python, no JAX."""

from __future__ import annotations

from bisect import insort
from collections import Counter
from collections.abc import Collection, Iterator
from heapq import nsmallest

from fly_jax.scheduling.request import Request

# One start in this many is the oldest request's, whatever its priority: nobody waits for ever behind a stream of
# requests that rank higher, and those still get seven starts of eight.
FAIR_TURN = 8


class RequestQueue:
    """Requests by rank: priority, then arrival. A request that was preempted goes back to where its rank puts it."""

    def __init__(self) -> None:
        self._requests: list[Request] = []
        self._of_client: Counter[str] = Counter()
        self._starts_since_turn = 0

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._requests)

    def add(self, request: Request) -> None:
        insort(self._requests, request, key=lambda each: each.rank)
        if request.client is not None:
            self._of_client[request.client] += 1

    def remove(self, request: Request) -> None:
        self._requests.remove(request)
        if request.client is not None:
            self._of_client[request.client] -= 1
            if not self._of_client[request.client]:
                del self._of_client[request.client]  # clients come and go for as long as a server runs

    def count_of(self, client: str) -> int:
        """How many of one client's requests wait."""
        return self._of_client[client]

    def start(self, request: Request) -> None:
        """Takes out a request because it starts to run."""
        self.remove(request)
        self._starts_since_turn += 1

    def next(self, passed_over: Collection[Request]) -> Request | None:
        """The first by rank among the others; None if there are none."""
        return next((request for request in self._requests if request not in passed_over), None)

    @property
    def turn_has_come(self) -> bool:
        """The oldest request that can start goes before all others, until it has started."""
        return self._starts_since_turn >= FAIR_TURN - 1

    def oldest(self, count: int) -> list[Request]:
        """So many of the oldest, whatever their rank."""
        return nsmallest(count, self._requests, key=lambda request: request.order)

    def took_turn(self, request: Request) -> None:
        """The oldest has started in its turn; those that it went before for its age cannot displace it."""
        self._starts_since_turn = 0
        request.overdue = request.overdue or any(each.rank < request.rank for each in self._requests[:1])
