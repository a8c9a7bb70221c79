"""What a fan out keeps of a batch on its way, and of each part that a server was asked for."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from expertmesh import dispatch
from expertmesh.codec.messages import ExecuteRequest, ExecuteResponse
from expertmesh.dispatch import Part
from expertmesh.errors import MeshError
from expertmesh.rpc.deadline import Deadline
from router_service.link import ServerLink
from router_service.routing import RoutedBatch


@dataclass(slots=True)
class Run:
    """One batch on its way."""

    batch: RoutedBatch
    layer: int
    deadline: Deadline
    salt: int
    retried_T: npt.NDArray[np.int64] | None = None  # see FanOutResult
    broken: dict[str, int] = field(default_factory=dict)  # internal errors by server
    silent: set[str] = field(default_factory=set)  # servers that said nothing for too long

    @property
    def rows(self) -> int:
        """Rows of the batch."""
        return self.batch.hidden.shape[0]

    def request(self, part: Part, epoch: int) -> ExecuteRequest:
        """What asks for a part of it."""
        rows = part.rows
        return ExecuteRequest(
            layer=self.layer,
            hidden_states=dispatch.rows_of(self.batch.hidden, rows),
            expert_ids=part.expert_ids,
            expert_weights=self.batch.weights if rows is None else self.batch.weights[rows],
            epoch=epoch,
        )

    def count_again(self, part: Part) -> None:
        """Notes that a part's pairs are sent again."""
        if self.retried_T is None:
            self.retried_T = np.zeros(self.rows, np.int64)
        pairs_R = (part.expert_ids >= 0).sum(1)
        if part.rows is None:
            self.retried_T += pairs_R
        else:
            self.retried_T[part.rows] += pairs_R


@dataclass(slots=True)
class Ask:
    """One part, as one server was asked for it."""

    part: Part
    server: str
    link: ServerLink | None  # None for a server that has left the directory
    shape: torch.Size  # of the answer
    future: asyncio.Future[ExecuteResponse]
    asked_at: float  # time.monotonic()
    patience_s: float  # how long to wait before the server is overdue
    look_at: float  # when to see whether a replica may be asked too
    noted: bool = False  # whether the link knows that it has answered

    @property
    def rows(self) -> int:
        """Rows of the part."""
        return self.shape[0]

    @property
    def right(self) -> bool:
        """Whether the answer is here, and is one."""
        return succeeded(self.future) and self.future.result().hidden_states.shape == self.shape

    def note_answer(self) -> None:
        """Tells the link, once, that it has answered: the batch may wait for others still."""
        if not self.noted and self.link is not None:
            self.noted = True
            self.link.answered(self.asked_at, self.rows, self.patience_s)

    @property
    def left_out(self) -> bool:
        """Whether the server would not be asked for it any more."""
        return self.link is not None and self.link.left_out(self.rows)


def wake(waiter: asyncio.Future[None]) -> None:
    """Ends a wait, once."""
    if not waiter.done():
        waiter.set_result(None)


def failed(error: MeshError) -> asyncio.Future[ExecuteResponse]:
    """An answer that is an error already."""
    future: asyncio.Future[ExecuteResponse] = asyncio.get_running_loop().create_future()
    future.set_exception(error)
    return future


def succeeded(future: asyncio.Future[Any]) -> bool:
    """Whether it is done, and well."""
    return future.done() and not future.cancelled() and future.exception() is None


def drop(future: asyncio.Future[Any]) -> None:
    """Gives up an answer that nobody needs any more; its failure is nobody's news."""
    if not future.cancel() and not future.cancelled():
        future.exception()
    else:
        future.add_done_callback(succeeded)
