"""Large bodies are read in a process of their own: parsing, rendering and tokenizing them hold the interpreter's lock.

Short requests do not wait for them, and the memory that they took goes when the process ends, soon after the last one.
"""

from __future__ import annotations

import asyncio
import pickle
import queue
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass

from fly_jax.errors import ClientQueueFullError, QueueFullError, RequestFailedError
from serving.protocol import Body
from serving.reading import Reader, Reading

# A smaller body takes a few milliseconds to read, and the way to another process and back about one.
LARGE_BYTES = 64 * 1024
# Of all that wait: four of the largest that a server takes by default.
MAX_WAITING_BYTES = 64 * 1024 * 1024
IDLE_SECONDS = 10.0
# Of a lane's bytes that one client's bodies may be, so that there is always room for another's.
CLIENT_SHARE = 0.5
# The largest body takes a tenth of it; a model's template may be a program that never ends.
READING_SECONDS = 120.0


_START = "import sys; sys.path = sys.argv[1:]; from serving.reading_process import main; main()"


@dataclass(frozen=True, slots=True)
class Job:
    """A body as it came, and what it should be."""

    model: type[Body]
    data: bytes


class LargeBodies:
    """The lane of large bodies, read one after another in the order in which they came.

    Args:
        max_waiting_bytes: of all bodies that wait; what comes beyond is refused, and of one client beyond its share.
        idle_seconds: the process ends when it has had nothing to do for so long.
    """

    def __init__(
        self,
        process: ReadingProcess,
        *,
        max_waiting_bytes: int = MAX_WAITING_BYTES,
        idle_seconds: float = IDLE_SECONDS,
    ) -> None:
        self.process = process
        self._waiting_bytes: Counter[str] = Counter()  # by client
        self._closed = False
        self._max_waiting_bytes, self._idle_seconds = max_waiting_bytes, idle_seconds
        self._jobs: queue.SimpleQueue[tuple[Job, Future[Reading]] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    @property
    def waiting_bytes(self) -> int:
        """Of the bodies that are waiting or being read."""
        return self._waiting_bytes.total()

    async def read(self, model: type[Body], data: bytes, client: str = "") -> Reading:
        """What the body says; one that is given up while it waits gives its place back.

        Raises:
            QueueFullError, ClientQueueFullError: too many bytes wait already, in all or of this client.
            RequestFailedError: the process ended while it read the body, or took too long.
            FlyJaxError, RequestValidationError: the body is wrong.
        """
        self._check_room(len(data), client)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="fly-jax-large-bodies", daemon=True)
            self._thread.start()
        future: Future[Reading] = Future()
        with self._waits(len(data), client):
            self._jobs.put((Job(model, data), future))
            return await asyncio.wrap_future(future)

    def _check_room(self, size: int, client: str) -> None:
        if self.waiting_bytes + size > self._max_waiting_bytes:
            raise QueueFullError(
                f"{self.waiting_bytes} bytes of large bodies wait to be read, and with {size} more they would be "
                f"over {self._max_waiting_bytes}: try later"
            )
        # A body that is alone is taken whatever its size, up to all that there is.
        if (waiting := self._waiting_bytes[client]) and waiting + size > CLIENT_SHARE * self._max_waiting_bytes:
            raise ClientQueueFullError(
                f"{waiting} bytes of your large bodies wait to be read, and with {size} more they would be over "
                f"{CLIENT_SHARE * self._max_waiting_bytes:.0f}: try later"
            )

    @contextmanager
    def _waits(self, size: int, client: str) -> Iterator[None]:
        self._waiting_bytes[client] += size
        try:
            yield
        finally:
            self._waiting_bytes[client] -= size
            if not self._waiting_bytes[client]:
                del self._waiting_bytes[client]

    def close(self) -> None:
        """Ends the process and whatever it is reading; bodies that wait are given up."""
        self._closed = True
        self._jobs.put(None)
        self.process.kill()

    def _run(self) -> None:
        while True:
            try:
                entry = self._jobs.get(timeout=self._idle_seconds if self.process.is_running else None)
            except queue.Empty:
                self.process.end()
                continue
            if entry is None:
                self.process.end()
                return
            job, future = entry
            if not future.set_running_or_notify_cancel():
                continue
            try:
                if self._closed:
                    raise RequestFailedError("the server is shutting down")
                future.set_result(self.process.read(job))
            except Exception as error:  # whatever it is, the client that waits is told
                future.set_exception(error)
            del entry, job, future  # the next may come in an hour


class ReadingProcess:
    """:mod:`serving.reading_process` as a process, started for the first body and again after it has failed or ended.

    It belongs to one thread; others may only :meth:`kill` it.

    Args:
        reading_seconds: a body that takes longer is given up.
    """

    def __init__(self, reader: Reader, reading_seconds: float = READING_SECONDS) -> None:
        self._reader, self._reading_seconds = reader, reading_seconds
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def is_running(self) -> bool:
        return self._process is not None

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    def read(self, job: Job) -> Reading:
        """
        Raises:
            RequestFailedError: the process ended meanwhile, or took too long.
            FlyJaxError, RequestValidationError: the body is wrong.
        """
        timer = threading.Timer(self._reading_seconds, self.kill)
        timer.daemon = True
        try:
            timer.start()
            outcome = self._exchange(job)
        except (OSError, EOFError, pickle.UnpicklingError) as error:
            self.end()
            raise RequestFailedError("the body could not be read: send less at once") from error
        finally:
            timer.cancel()
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def kill(self) -> None:
        if (process := self._process) is not None:
            process.kill()

    def end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _exchange(self, job: Job) -> Reading | Exception:
        if self._process is not None and self._process.poll() is not None:
            self.end()  # somebody has ended it, which is not this body's fault
        process = self._process or self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        pickle.dump(job, process.stdin)
        process.stdin.flush()
        outcome: Reading | Exception = pickle.load(process.stdout)
        return outcome

    def _start(self) -> subprocess.Popen[bytes]:
        # In a session of its own, as Ctrl-C is for the server: that one tells its clients first. It finds modules where
        # the server does: a file beside which that was started may have the name of one of them.
        command = [sys.executable, "-P", "-c", _START, *sys.path]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
        self._process = process
        assert process.stdin is not None
        pickle.dump(self._reader, process.stdin)
        return process
