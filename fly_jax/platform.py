"""The one place that reads and writes the process environment, before jax starts its backend.

The command line, the tests and the notebooks all come through :func:`configure_devices`.
"""

from __future__ import annotations

import contextlib
import os
import resource
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from fly_jax.errors import ConfigError

if TYPE_CHECKING:
    import jax

# Virtual CPU devices where nobody says how many.
DEFAULT_DEVICES = 4
_DEVICE_COUNT_FLAG = "--xla_force_host_platform_device_count"
# Where Linux lists a process's threads; a priority is a thread's own there.
_THREADS = Path("/proc/self/task")
# At 19 a stream waited 0.8 s for a step while a flood kept the server's own threads busy; at 5 they waited instead.
_DEVICE_NICENESS = 10
# Of a GPU's memory, what jax takes. By itself it takes 0.75, and ``gpu_memory_utilization`` would be a part of that.
_GPU_FRACTION = "0.95"
_GPU_FRACTION_NAMES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")


def configure_devices(count: int) -> None:
    """Gives the CPU platform ``count`` virtual devices, and jax most of a GPU's memory.

    In-process collectives need every device's thread to arrive, and XLA's pool has max(cores, devices)
    threads: four devices on two cores with several steps in flight hung until NPROC was four times
    the device count.

    Raises:
        ConfigError: jax has already started with fewer CPU devices, or a variable that is read here is no number.
    """
    flags = [f for f in os.environ.get("XLA_FLAGS", "").split() if not f.startswith(_DEVICE_COUNT_FLAG)]
    present = _requested_devices()
    wanted = max(count, present)
    os.environ["XLA_FLAGS"] = " ".join([*flags, f"{_DEVICE_COUNT_FLAG}={wanted}"])
    os.environ["NPROC"] = str(max(4 * wanted, _whole_number("NPROC", os.environ.get("NPROC") or "0")))
    if not any(name in os.environ for name in _GPU_FRACTION_NAMES):  # jax refuses to start with both
        os.environ[_GPU_FRACTION_NAMES[0]] = _GPU_FRACTION
    if "jax" in sys.modules:
        _check_started(count)


def start_devices() -> list[jax.Device]:
    """jax's devices; on CPU, threads that compute for them give way to the process's own.

    Virtual CPU devices compute on the host's cores. With 8 of them on 2 cores, the engine's thread waited two thirds
    of the time of a cutover for a core; on accelerators it never waits for the devices.
    """
    import jax

    before = _threads()
    devices: list[jax.Device] = jax.devices()
    if jax.default_backend() == "cpu":
        # Not Python's: on a busy host a timer of jax's runs on for a moment, and others may start threads meanwhile.
        own = {thread.native_id for thread in threading.enumerate()}
        for thread in _threads() - before - own:
            with contextlib.suppress(ProcessLookupError):  # it has ended
                os.setpriority(os.PRIO_PROCESS, thread, _DEVICE_NICENESS)
    return devices


def _threads() -> set[int]:
    return {int(each.name) for each in _THREADS.iterdir()} if _THREADS.is_dir() else set()


def configure_deviceless_cuda(dump: Path | None = None) -> None:
    """Lets jax compile for NVIDIA GPUs on a machine that has none; only before jax is imported.

    The CUDA plugin's version check asks a driver, so it is switched off.

    Args:
        dump: a folder for what XLA made of each program.
    """
    if dump is not None:
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_dump_to={dump}".strip()
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
    os.environ["JAX_PLATFORMS"] = "cpu,cuda"


def use_cpu_only() -> None:
    """Leaves GPUs alone in this process; only before jax starts."""
    os.environ["JAX_PLATFORMS"] = "cpu"


def share_gpu_memory() -> None:
    """Leaves GPU memory that jax does not use to other libraries of this process; only before jax starts."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


def _requested_devices() -> int:
    for flag in os.environ.get("XLA_FLAGS", "").split():
        if flag.startswith(_DEVICE_COUNT_FLAG + "="):
            return _whole_number(f"XLA_FLAGS {_DEVICE_COUNT_FLAG}", flag.split("=", 1)[1])
    return 1


def _whole_number(name: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"environment variable {name}={text!r} must be a whole number: correct or unset it") from None


def _check_started(count: int) -> None:
    import jax

    have = len(start_devices())
    if jax.default_backend() == "cpu" and have < count:
        raise ConfigError(
            f"{count} devices asked for but jax has already started with {have}: "
            "restart the Python process (or notebook kernel) and create the engine before using jax"
        )


def cache_dir() -> Path:
    """Where compiled programs are kept between runs: $FLY_JAX_CACHE_DIR, or the user's cache folder."""
    if chosen := os.environ.get("FLY_JAX_CACHE_DIR"):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "fly_jax"


def secret(name: str) -> str | None:
    """A secret from the environment, FLY_JAX_API_KEY or FLY_JAX_ADMIN_KEY: empty if it is set but empty."""
    return os.environ.get(name)


def host_memory_bytes() -> int:
    """Physical memory of this machine, or this process's cgroup limit if lower."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.exists() and (text := limit.read_text().strip()).isdigit():
        total = min(total, int(text))
    return total


def raise_file_limit(wanted: int) -> int:
    """Lets this process open so many files, or as many as its hard limit has; returns how many it may now."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return wanted if soft == resource.RLIM_INFINITY else soft
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    return allowed
