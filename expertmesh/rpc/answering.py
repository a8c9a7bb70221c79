"""One call of a handler: whatever goes wrong comes out as an error of ours, and in time."""

from __future__ import annotations

import asyncio
import logging
import traceback
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

from expertmesh.errors import CancelledRequestError, DeadlineError, InternalError, MeshError
from expertmesh.rpc.deadline import Deadline

#: Answers one request of an RPC: (request, deadline) -> response.
Handler = Callable[[Any, Deadline], Awaitable[Any]]

_log = logging.getLogger(__name__)
UNANSWERED = DeadlineError(
    "the answer was not complete before the deadline: allow more time, or send fewer rows"
)


def forget(failure: BaseException) -> None:
    """Frees what the functions that failed had at hand: the rows of the request among it."""
    left: list[BaseException | None] = [failure]
    seen: set[int] = set()
    while left:
        each = left.pop()
        if each is None or id(each) in seen:
            continue
        seen.add(id(each))
        traceback.clear_frames(each.__traceback__)
        left += [each.__cause__, each.__context__]
        if isinstance(each, BaseExceptionGroup):  # several servers failed, each in a task
            left += each.exceptions


async def answer_in_time(handle: Handler, request: Any, deadline: Deadline) -> Any:
    """`answer`, ended with DeadlineError when the deadline passes."""
    try:
        async with asyncio.timeout(deadline.timeout):
            return await answer(handle, request, deadline)
    except TimeoutError:
        raise DeadlineError(UNANSWERED.message) from None


async def answer(handle: Handler, request: Any, deadline: Deadline) -> Any:
    """Calls a handler; whatever goes wrong comes out as a MeshError. Who calls minds the deadline,
    which must not have passed yet."""
    try:
        deadline.check()
        return await handle(request, deadline)
    except MeshError:
        raise
    except asyncio.CancelledError:
        raise
    except BaseExceptionGroup as group:
        raise first_mesh_error(group) from None
    except Exception as error:
        raise internal(error) from None


def first_mesh_error(group: BaseExceptionGroup[BaseException]) -> MeshError:
    """The first error of ours in a TaskGroup's failure, else an InternalError."""
    found: list[BaseException] = [group]
    while found:
        error = found.pop(0)
        if isinstance(error, BaseExceptionGroup):
            found = [*error.exceptions, *found]
        elif isinstance(error, MeshError):
            return error
    return internal(group)


def internal(error: BaseException) -> MeshError:
    """Hides a bug of ours behind an incident id, and logs what it was."""
    if isinstance(error, asyncio.CancelledError):
        return CancelledRequestError("the request was given up")
    incident = uuid.uuid4().hex[:12]
    _log.error("incident %s", incident, exc_info=error)
    return InternalError(f"internal error, incident {incident}: see the server's log")
