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
from concurrent.futures import Future
from dataclasses import dataclass

from fly_jax.errors import QueueFullError, RequestFailedError
from serving.protocol import Body
from serving.reading import Reader, Reading

# A smaller body takes a few milliseconds to read, and the way to another process and back about one.
LARGE_BYTES = 64 * 1024
# Of all that wait: four of the largest that a server takes by default.
MAX_WAITING_BYTES = 64 * 1024 * 1024
IDLE_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Job:
    """A body as it came, and what it should be."""

    model: type[Body]
    data: bytes


class LargeBodies:
    """The lane of large bodies, read one after another in the order in which they came.

    Args:
        max_waiting_bytes: of all bodies that wait; what comes beyond is refused.
        idle_seconds: the process ends when it has had nothing to do for so long.

    Attributes:
        waiting_bytes: of the bodies that are waiting or being read.
    """

    def __init__(
        self,
        process: ReadingProcess,
        *,
        max_waiting_bytes: int = MAX_WAITING_BYTES,
        idle_seconds: float = IDLE_SECONDS,
    ) -> None:
        self.waiting_bytes = 0
        self.process = process
        self._max_waiting_bytes, self._idle_seconds = max_waiting_bytes, idle_seconds
        self._jobs: queue.SimpleQueue[tuple[Job, Future[Reading]] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    async def read(self, model: type[Body], data: bytes) -> Reading:
        """What the body says; one that is given up while it waits gives its place back.

        Raises:
            QueueFullError: too many bytes wait already.
            RequestFailedError: the process ended while it read the body.
            FlyJaxError, RequestValidationError: the body is wrong.
        """
        if self.waiting_bytes + len(data) > self._max_waiting_bytes:
            raise QueueFullError(
                f"{self.waiting_bytes} bytes of large bodies wait to be read, and with {len(data)} more they would be "
                f"over {self._max_waiting_bytes}: try later"
            )
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="fly-jax-large-bodies", daemon=True)
            self._thread.start()
        future: Future[Reading] = Future()
        self.waiting_bytes += len(data)
        try:
            self._jobs.put((Job(model, data), future))
            return await asyncio.wrap_future(future)
        finally:
            self.waiting_bytes -= len(data)

    def close(self) -> None:
        """Ends the process and whatever it is reading."""
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
                future.set_result(self.process.read(job))
            except Exception as error:  # whatever it is, the client that waits is told
                future.set_exception(error)
            del entry, job, future  # the next may come in an hour


class ReadingProcess:
    """``python -m serving.reading_process``, started for the first body and again after it has failed or ended.

    It belongs to one thread; others may only :meth:`kill` it.
    """

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
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
            RequestFailedError: the process ended meanwhile.
            FlyJaxError, RequestValidationError: the body is wrong.
        """
        try:
            outcome = self._exchange(job)
        except (OSError, EOFError, pickle.UnpicklingError) as error:
            self.end()
            raise RequestFailedError("the body could not be read: send less at once") from error
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
        process = self._process or self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        pickle.dump(job, process.stdin)
        process.stdin.flush()
        outcome: Reading | Exception = pickle.load(process.stdout)
        return outcome

    def _start(self) -> subprocess.Popen[bytes]:
        # In a session of its own, as Ctrl-C is for the server: that one tells its clients first.
        command = [sys.executable, "-m", "serving.reading_process"]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
        self._process = process
        assert process.stdin is not None
        pickle.dump(self._reader, process.stdin)
        return process
