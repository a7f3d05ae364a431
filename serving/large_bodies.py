"""Large bodies are read in a process of their own: parsing, rendering and tokenizing them hold the interpreter's lock.

Short requests do not wait for them, and the memory that they took goes when the process ends, soon after the last one.
"""

from __future__ import annotations

import asyncio
import logging
import pickle
import queue
import subprocess
import sys
import threading
from concurrent.futures import Future
from dataclasses import dataclass

from fly_jax.errors import RequestFailedError
from serving.byte_budget import ByteBudget
from serving.protocol import Body
from serving.reading import Reader, Reading

logger = logging.getLogger(__name__)

# A smaller body takes a few milliseconds to read, and the way to another process and back about one.
LARGE_BYTES = 64 * 1024
# Of all that wait: four of the largest that a server takes by default.
MAX_WAITING_BYTES = 64 * 1024 * 1024
IDLE_SECONDS = 10.0
# Ten times what the largest took to be tokenized; a model's template may be a program that never ends.
READING_SECONDS = 120.0


_START = "import sys; sys.path = sys.argv[1:]; from serving.reading_process import main; main()"


@dataclass(frozen=True, slots=True)
class Job:
    """A body as it came, and what it should be."""

    model: type[Body]
    data: bytes


@dataclass(frozen=True, slots=True)
class Failure:
    """Something went wrong that is not the body's fault; ``trace`` is for the log."""

    trace: str


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
        self._waiting = ByteBudget(max_waiting_bytes, "large bodies wait to be read")
        self._closed = False
        self._idle_seconds = idle_seconds
        self._jobs: queue.SimpleQueue[tuple[Job, Future[Reading]] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    @property
    def waiting_bytes(self) -> int:
        """Of the bodies that are waiting or being read."""
        return self._waiting.total

    async def read(self, model: type[Body], data: bytes, client: str = "") -> Reading:
        """What the body says; one that is given up while it waits gives its place back.

        Raises:
            QueueFullError, ClientQueueFullError: too many bytes wait already, in all or of this client.
            RequestFailedError: the process ended while it read the body, or took too long.
            FlyJaxError, RequestValidationError: the body is wrong.
        """
        with self._waiting.body(client) as waiting:
            waiting.grow(len(data))
            return await self._read(Job(model, data))

    async def _read(self, job: Job) -> Reading:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="fly-jax-large-bodies", daemon=True)
            self._thread.start()
        future: Future[Reading] = Future()
        self._jobs.put((job, future))
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            if future.running():  # whoever sent it has left, and others may wait
                self.process.kill()
            raise

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
        self._killed = False

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
        timer = threading.Timer(self._reading_seconds, self._time_out)
        timer.daemon = True
        try:
            timer.start()
            outcome = self._exchange(job)
        except Exception as error:  # whatever it is, what comes next out of the pipe would be somebody else's
            status = self.end()
            if not self._killed:
                logger.error("the process that reads large bodies failed (%r), exit status %s", error, status)
            raise RequestFailedError("the body could not be read: send less at once") from error
        finally:
            timer.cancel()
        if isinstance(outcome, Failure):
            logger.error("a large body could not be read\n%s", outcome.trace)
            raise RequestFailedError("the body could not be read, and the server's log says why")
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def kill(self) -> None:
        if (process := self._process) is not None:
            self._killed = True
            process.kill()

    def _time_out(self) -> None:
        logger.error("a large body took more than %g s to read and is given up", self._reading_seconds)
        self.kill()

    def end(self) -> int | None:
        """Returns its exit status, negative for a signal; None if there was none."""
        if (process := self._process) is None:
            return None
        process.kill()
        process.communicate()
        self._process = None
        return process.returncode

    def _exchange(self, job: Job) -> Reading | Exception | Failure:
        if self._process is not None and self._process.poll() is not None:
            self.end()  # somebody has ended it, which is not this body's fault
        process = self._process or self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        pickle.dump(job, process.stdin)
        process.stdin.flush()
        outcome: Reading | Exception | Failure = pickle.load(process.stdout)
        return outcome

    def _start(self) -> subprocess.Popen[bytes]:
        # In a session of its own, as Ctrl-C is for the server: that one tells its clients first. It finds modules where
        # the server does: a file beside which that was started may have the name of one of them.
        command = [sys.executable, "-P", "-c", _START, *sys.path]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
        self._process, self._killed = process, False
        assert process.stdin is not None
        pickle.dump(self._reader, process.stdin)
        return process
