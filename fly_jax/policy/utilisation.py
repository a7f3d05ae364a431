"""How much of what a layout can do a load asks of it. Pure Python, no JAX."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from fly_jax.layout import DeviceGroup, Layout
from fly_jax.policy.candidates import Needs, degrees_of
from fly_jax.policy.observation import Load, Machine, RequestLoad

# Prompts that wait should be computed within so many seconds: what people take for an immediate answer.
BACKLOG_SECONDS = 1.0
# A layout whose decode steps take this much longer than the fastest one's does not serve crowded slots well.
CLEARLY_SLOWER = 1.1


@dataclass(frozen=True, slots=True)
class Demand:
    """What requests ask for.

    Attributes:
        prompt_rate, output_rate: tokens a second.
        backlog: prompt tokens that are there and not computed; ``largest`` of them are one request's.
        rows: requests that run or would.
        width: TP degree that the requests need.
    """

    prompt_rate: float
    output_rate: float
    backlog: int
    largest: int
    rows: int
    width: int


def demands(load: Load, needs: Needs) -> list[Demand]:
    """What all requests ask for, and those that only groups of some degree serve."""
    everyone = _demand([request for request, _ in load.requests()], load, share=1.0, width=1)
    found = [everyone]
    wide: list[RequestLoad] = []
    for width in sorted(needs.served, reverse=True):
        wide += needs.served[width]
        found.append(_demand(wide, load, share=len(wide) / everyone.rows, width=width))
    return found


def _demand(requests: Sequence[RequestLoad], load: Load, *, share: float, width: int) -> Demand:
    # A running request whose one token is uncomputed decodes.
    prompts = [request.uncomputed for request in requests if request.uncomputed > 1]
    return Demand(
        prompt_rate=share * load.prompt_rate,
        output_rate=share * load.output_rate,
        backlog=sum(prompts),
        largest=max(prompts, default=0),
        rows=len(requests),
        width=width,
    )


class Capacity:
    """What groups can do, from the measured step times. A degree without any is taken to do nothing."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        times = machine.step_times
        self.decode = times.decode
        degrees = degrees_of(machine)
        self.prompt_speed = {degree: _best_rate(times.mixed.get(degree, {})) for degree in degrees}
        self.output_speed = {degree: _best_rate(times.decode.get(degree, {})) for degree in degrees}

    def utilisations(self, layouts: Iterable[Layout], demands: Sequence[Demand]) -> dict[Layout, float]:
        """Fraction of a layout's capacity that is asked for; 1 is all of it.

        It is the larger of how busy steps would keep the groups, those groups that only some requests can use
        included, and how crowded the slots are, where a narrower layout would decode clearly faster: a rate of
        arrivals alone forgets requests that decode for long.
        """
        rows = demands[0].rows
        paces = {layout: self._pace(layout, rows) for layout in layouts}
        found = {}
        for layout, pace in paces.items():
            busy = max(self._busy(layout.groups, demand) for demand in demands)
            narrower = max(paces[each] for each in paces if len(each.degrees) >= len(layout.degrees))
            slower = narrower / pace if pace else 1.0
            crowded = slower * rows / self._slots(layout) if slower > CLEARLY_SLOWER else 0.0
            found[layout] = max(busy, crowded)
        return found

    def _busy(self, groups: Iterable[DeviceGroup], demand: Demand) -> float:
        """Seconds of steps a second, on groups that share the work in proportion to what they can do.

        The backlog takes at least as long as its largest prompt does in the fastest group.
        """
        sizes = [group.tp for group in groups if group.tp >= demand.width]
        prompts = sum(self.prompt_speed.get(size, 0.0) for size in sizes)
        outputs = sum(self.output_speed.get(size, 0.0) for size in sizes)
        if not prompts or not outputs:
            return float("inf")
        fastest = max(self.prompt_speed.get(size, 0.0) for size in sizes)
        backlog = max(demand.backlog / prompts, demand.largest / fastest)
        return demand.prompt_rate / prompts + demand.output_rate / outputs + backlog / BACKLOG_SECONDS

    def _pace(self, layout: Layout, rows: int) -> float:
        """Tokens a second of one of these requests, on average, when they are spread evenly over the devices."""
        devices = layout.num_devices
        pace = 0.0
        for size in layout.degrees:
            in_group = min(-(-rows * size // devices), self._max_running(size))
            if seconds := _seconds(self.decode.get(size, {}), in_group):
                pace += size / devices / seconds
        return pace

    def _slots(self, layout: Layout) -> int:
        return sum(self._max_running(size) for size in layout.degrees)

    def _max_running(self, degree: int) -> int:
        return self.machine.limits.max_running(degree, self.machine.base_tp)


def _best_rate(buckets: Mapping[int, float]) -> float:
    """Tokens a second in the bucket that computes most."""
    return max((size / seconds for size, seconds in buckets.items() if seconds > 0), default=0.0)


def _seconds(buckets: Mapping[int, float], needed: int) -> float:
    """Of the smallest bucket that holds so many, or as many of the largest as it takes; 0 if there are none."""
    if not buckets:
        return 0.0
    largest = max(buckets)
    if needed > largest:
        return buckets[largest] * needed / largest
    return buckets[min(size for size in buckets if size >= needed)]
