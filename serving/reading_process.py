"""The process that reads large bodies: jobs come by standard input, readings leave by standard output, as pickles."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import sys
import traceback
from typing import IO, Any

from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from fly_jax.errors import FlyJaxError
from serving.large_bodies import Failure, Job
from serving.reading import Reader, Reading

# Those who wait for tokens come before those whose body is large.
NICENESS = 10


def main() -> None:
    """Works until its input ends, as it does with the server, however that ended."""
    os.nice(NICENESS)
    with contextlib.suppress(BrokenPipeError):  # nobody waits for the answer any more
        _work(sys.stdin.buffer)


def _work(jobs: IO[bytes]) -> None:
    with os.fdopen(os.dup(sys.stdout.fileno()), "wb") as answers:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # so that nothing that is printed becomes an answer
        reader: Reader = pickle.load(jobs)
        while (job := _next(jobs)) is not None:
            outcome = read(reader, job)
            del job
            pickle.dump(outcome, answers)
            answers.flush()
            del outcome


def _next(jobs: IO[bytes]) -> Job | None:
    try:
        job: Job = pickle.load(jobs)
    except EOFError:
        return None
    return job


def read(reader: Reader, job: Job) -> Reading | Exception | Failure:
    """As the framework reads a body, with the same errors."""
    try:
        content = json.loads(job.data)
    except json.JSONDecodeError as error:
        return _invalid("json_invalid", ("body", error.pos), "JSON decode error", {"error": error.msg})
    except (ValueError, RecursionError, MemoryError):
        return HTTPException(400, "There was an error parsing the body")
    try:
        body = job.model.model_validate(content)
        return Reading(body.without_content(), reader.read(body))
    except FlyJaxError as error:
        return error
    except ValidationError as error:
        # One is shown; each of millions would carry what was wrong in it.
        first = error.errors(include_url=False, include_input=False)[0]
        return _invalid(first["type"], ("body", *first["loc"]), first["msg"], {})
    except Exception:  # a fault of ours or of the model's: the server logs it, and this process goes on
        return Failure(traceback.format_exc())


def _invalid(kind: str, place: tuple[int | str, ...], message: str, context: dict[str, Any]) -> RequestValidationError:
    return RequestValidationError([{"type": kind, "loc": place, "msg": message, "input": {}, "ctx": context}])


if __name__ == "__main__":
    main()
