"""Schedulers without an engine, and what tests ask of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fly_jax.kv.slabs import HeadSplits, PackedRelayout, SlabMove
from fly_jax.layout import DeviceGroup, Layout, all_groups
from fly_jax.scheduling.request import Request
from fly_jax.scheduling.scheduler import Scheduler
from fly_jax.scheduling.step import SchedulerLimits
from fly_jax.switching.switcher import Switcher
from tests.fly_jax.builders import make_kv, make_request


class NoMover:
    """Moves nothing; what is moved is tested with the engine."""

    chunk_slabs = 16

    def pack_relayout(
        self,
        group: DeviceGroup,
        splits: HeadSplits,
        moves: Sequence[SlabMove],
        token_devices: Mapping[int, int],  # noqa: ARG002  a mover's shape
    ) -> PackedRelayout:
        return PackedRelayout(group, splits, len(moves), ())

    def relayout(self, packed: PackedRelayout) -> None:
        """Moves nothing."""


def make_scheduler(
    layout: str,
    *,
    num_blocks: int = 64,
    max_num_seqs: int = 4,
    max_model_len: int = 1000,
    max_queued: int = 100,
    max_queued_per_client: int | None = None,
    patience: int = 512,
    elastic: bool = False,
) -> Scheduler:
    scheduler = Scheduler(
        Layout.parse(layout, 4),
        SchedulerLimits(max_num_seqs, 64, patience),
        make_kv(num_blocks, num_devices=4),
        max_model_len=max_model_len,
        max_queued=max_queued,
        max_queued_per_client=max_queued_per_client,
        compiled=all_groups(4, 1),
        elastic=elastic,
    )
    Switcher(scheduler, NoMover())
    return scheduler


def switcher_of(scheduler: Scheduler) -> Switcher:
    """What changes its layout."""
    assert isinstance(scheduler.hooks, Switcher)
    return scheduler.hooks


def add(scheduler: Scheduler, *requests: Request) -> None:
    for request in requests:
        scheduler.check(len(request.prompt_ids), request.min_width, client=request.client)
        scheduler.add(request)


def send(scheduler: Scheduler, name: str, prompt: int = 4, **options: Any) -> Request:
    request = make_request(prompt, name=name, **options)
    add(scheduler, request)
    return request


def group_of(request: Request) -> DeviceGroup:
    return request.held_table.group


def names(requests: Sequence[Request]) -> list[str]:
    return [request.request_id for request in requests]
