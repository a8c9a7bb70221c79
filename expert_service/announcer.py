"""An expert server's loop with the load controller: I am here, this is what I did."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress

import grpc.aio

from expertmesh.codec.slots import slots_of
from expertmesh.errors import MeshError, MismatchError, SupersededError
from expertmesh.model import Slot
from expertmesh.rpc import status
from expertmesh.rpc.channel import open_channel
from expertmesh.v1 import control_pb2, control_pb2_grpc

_log = logging.getLogger(__name__)
_TIMEOUT_S = 5.0


class Announcer:
    """Announces a server now, at once after changes, and every second."""

    def __init__(
        self,
        controller: str,
        announcement: Callable[[], control_pb2.AnnounceServerRequest],
        executions: Callable[[], control_pb2.ReportExecutionsRequest],
        every_s: float,
    ) -> None:
        self.oldest_epoch = 0
        #: What the controller wants this server to load instead of what its start named.
        self.assigned: list[Slot] = []
        self._heard = asyncio.Event()
        self._controller = controller
        self._announcement = announcement
        self._executions = executions
        self._every_s = every_s
        self._changed = asyncio.Event()
        self._sequence = 0
        self._reported: list[control_pb2.LayerExecutions] = []
        self._channel = open_channel(controller)
        self._stub = control_pb2_grpc.ControlServiceStub(self._channel)

    def changed(self) -> None:
        """The announcement differs from the last one: do not wait for the second to end."""
        self._changed.set()

    async def first_answer(self, timeout_s: float) -> None:
        """Returns once the controller has answered, or after that long."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._heard.wait()

    async def run(self) -> MeshError:
        """Runs until the controller refuses this server for good; returns why."""
        heard = True
        while True:
            self._changed.clear()
            try:
                await self.announce()
                heard = True
            except (MismatchError, SupersededError) as error:
                return error
            except MeshError as error:
                if heard:
                    _log.warning("announcing: %s; serving goes on", error.message)
                heard = False
            try:
                async with asyncio.timeout(self._every_s):
                    await self._changed.wait()
            except TimeoutError:
                continue

    async def announce(self) -> None:
        """Announces once, and reports executions if there are new ones."""
        try:
            response = await self._stub.AnnounceServer(self._announcement(), timeout=_TIMEOUT_S)
            self.oldest_epoch = response.oldest_epoch
            self.assigned = slots_of(response.layers)
            self._heard.set()
            report = self._executions()
            if list(report.layers) != self._reported:
                self._sequence += 1
                report.sequence = self._sequence
                await self._stub.ReportExecutions(report, timeout=_TIMEOUT_S)
                self._reported = list(report.layers)
        except grpc.aio.AioRpcError as error:
            raise status.from_call(error, f"load controller at {self._controller}") from None

    async def close(self) -> None:
        """Closes the channel; `run` must have ended."""
        await self._channel.close()
