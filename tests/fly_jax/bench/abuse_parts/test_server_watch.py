"""What is read of a server's process, and what is not there to be read."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import pytest

from fly_jax.bench.abuse_parts.records import ServerSeen
from fly_jax.bench.abuse_parts.server_watch import WatchedServer, watching

NOBODY = "http://127.0.0.1:9"


def test_without_a_process_a_log_or_an_answer_nothing_is_made_up() -> None:
    async def watched() -> ServerSeen:
        async with watching(WatchedServer(NOBODY)) as watch:
            return await watch.end()

    assert asyncio.run(watched()) == ServerSeen()


def test_a_log_counts_by_what_it_grew(tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    log.write_text("before\n")

    async def watched() -> ServerSeen:
        async with watching(WatchedServer(NOBODY, log=log)) as watch:
            with log.open("a") as file:
                file.write("12345\n")
            return await watch.end()

    assert asyncio.run(watched()).log_bytes == 6


@pytest.mark.skipif(sys.platform != "linux", reason="memory of other processes is read from /proc")
def test_memory_is_the_process_s_own_and_none_when_it_has_ended() -> None:
    assert (WatchedServer(NOBODY, pid=os.getpid()).rss_mib() or 0) > 1
    assert WatchedServer(NOBODY, pid=2**22 + 1).rss_mib() is None
