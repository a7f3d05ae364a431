"""The command itself: phases one after another, the table, the file."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import aiohttp

from fly_jax.bench import results, terminal
from fly_jax.bench.abuse_parts.abuser import Abuser, abusing
from fly_jax.bench.abuse_parts.phases import PHASES, Phase
from fly_jax.bench.abuse_parts.probe_process import ProbeProcess, probe_process
from fly_jax.bench.abuse_parts.probes import ProbeSettings
from fly_jax.bench.abuse_parts.records import PhaseResult
from fly_jax.bench.abuse_parts.server_watch import WatchedServer, watching
from fly_jax.bench.abuse_parts.sizes import Sizes, sizes_of
from fly_jax.bench.abuse_parts.table import tables
from fly_jax.bench.output_paths import check_folder
from fly_jax.bench.self_hosted import hosted, split_server_arguments, vocab_size
from fly_jax.bench.served_model import served_model
from fly_jax.errors import ConfigError
from fly_jax.platform import secret

# Enough for a stream to last for a phase, and within the context of small models.
STREAM_TOKENS = 800
UNKNOWN_LENGTH = 1024
# A server that we start may have so many files, so that as many connections can be made from one client.
OPEN_FILES = 4096
REST_SECONDS = 120
# Of the log of a server that failed.
SHOWN_CHARACTERS = 2000


@dataclass(frozen=True, slots=True)
class Setting:
    """A server that runs, and everything about it that is the same for all phases."""

    server: WatchedServer
    sizes: Sizes
    probes: ProbeSettings


def run(options: argparse.Namespace) -> int:
    """Runs the phases and prints what they showed.

    Raises:
        ConfigError: an option, or a server that cannot be had or answers no more.
    """
    if options.url is None and options.self_hosted is None:
        raise ConfigError("give --url or --self-hosted: a server is only abused when it is named")
    if options.server_args and options.self_hosted is None:
        raise ConfigError("--server-args needs --self-hosted: a running server has its arguments already")
    chosen = _chosen(options.phases)
    sizes = sizes_of(options)
    if options.save_result:
        check_folder("--result-dir", options.result_dir)
    with _server(options) as server:
        asyncio.run(_run_phases(options, chosen, _setting(options, server, sizes)))
    return 0


def _chosen(names: Sequence[str]) -> list[Phase]:
    known = {phase.name: phase for phase in PHASES}
    if unknown := [name for name in names if name not in known]:
        raise ConfigError(f"--phases {' '.join(unknown)}: there is no such phase, only {' '.join(known)}")
    return [phase for phase in PHASES if not names or phase.name in names]


@contextlib.contextmanager
def _server(options: argparse.Namespace) -> Iterator[WatchedServer]:
    """The running server, or one that is started and stopped."""
    if options.url is not None:
        yield WatchedServer(options.url.rstrip("/"), options.pid, options.server_log)
        return
    arguments = split_server_arguments(options.server_args)
    vocab_size(options.self_hosted)  # a folder that is none is found here
    with tempfile.TemporaryDirectory(prefix="fly-jax-abuse-") as folder:
        log = options.server_log or Path(folder) / "server.log"
        terminal.say(f"starting a server of {options.self_hosted}; its log goes to {log}")
        try:
            with (
                log.open("w") as file,
                hosted(options.self_hosted, arguments, output=file, open_files=OPEN_FILES) as server,
            ):
                yield WatchedServer(server.url, server.pid, log)
        except ConfigError:  # the log may not outlast this
            terminal.say(log.read_text(errors="replace")[-SHOWN_CHARACTERS:])
            raise


def _setting(options: argparse.Namespace, server: WatchedServer, sizes: Sizes) -> Setting:
    api_key = options.api_key or secret("FLY_JAX_API_KEY")
    headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
    model = served_model(server.url, options.model, headers)
    tokens = min(STREAM_TOKENS, (model.max_model_len or UNKNOWN_LENGTH) // 2)
    return Setting(server, sizes, ProbeSettings(server.url, model.name, 1, options.prompt, tokens, api_key))


async def _run_phases(options: argparse.Namespace, chosen: Sequence[Phase], setting: Setting) -> None:
    """The result file is written after each phase, so that a server that ends leaves what was found before."""
    found: list[PhaseResult] = []
    try:
        async with probe_process() as probes:
            for phase in chosen:
                terminal.say(f"{phase.name}: {(phase.run.__doc__ or '').strip().rstrip('.')}")
                found.append(await _run_phase(phase, setting, probes))
                if options.save_result:
                    _save(options, setting.sizes, found)
    finally:
        print(tables(found))


async def _run_phase(phase: Phase, setting: Setting, probe_process: ProbeProcess) -> PhaseResult:
    sizes, probes = setting.sizes, setting.probes
    if phase.has_crowd:
        probes = replace(probes, streams=sizes.other_streams)
    async with (
        watching(setting.server) as watch,
        abusing(setting.server.url, probes.model, sizes, probes.api_key) as abuser,
    ):
        await probe_process.start(probes)
        started = time.monotonic()
        figures = {}
        try:
            async with asyncio.timeout(sizes.phase_seconds):
                figures = dict(await phase.run(abuser))
        except TimeoutError:
            figures = {"cut_off_after_s": sizes.phase_seconds}
        seconds = round(time.monotonic() - started, 1)
        await asyncio.sleep(sizes.after_seconds)
        seen = await probe_process.stop()
        await _rest(abuser)
        return PhaseResult(phase.name, seconds, dict(abuser.answers), figures, seen, await watch.end())


async def _rest(abuser: Abuser) -> None:
    """Until the server has nothing in flight any more, and a little longer, or only that if it does not say."""
    deadline = time.monotonic() + REST_SECONDS
    timeout = aiohttp.ClientTimeout(total=REST_SECONDS)
    with contextlib.suppress(aiohttp.ClientError, TimeoutError, OSError, ValueError, KeyError, TypeError):
        while time.monotonic() < deadline:
            async with abuser.session.get(f"{abuser.url}/load", timeout=timeout) as response:
                if (await response.json())["server_load"] == 0:
                    break
            await asyncio.sleep(0.1)
    await asyncio.sleep(abuser.sizes.settle_seconds)


def _save(options: argparse.Namespace, sizes: Sizes, found: Sequence[PhaseResult]) -> None:
    result = {
        "label": options.label,
        "server": "self-hosted" if options.url is None else options.url,
        "server_args": options.server_args,
        "sizes": asdict(sizes),
        "phases": [asdict(each) for each in found],
    }
    results.save(options.result_dir, f"abuse-{options.label}", result, of_devices=False)
