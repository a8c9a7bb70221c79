"""What the host of an expert server says of a server that it does not have. Without Ray."""

from __future__ import annotations

import asyncio
import pickle
from types import SimpleNamespace
from typing import Any

import pytest

import expert_service.actor
from expert_service.actor import ExpertServerHost, ExpertServerOptions
from expertmesh.errors import MeshError, NoRoomError
from expertmesh.rpc import loop

_OPTIONS = ExpertServerOptions(checkpoint="", slots=(), server_id="s", controller="127.0.0.1:1")
_WHY = NoRoomError("no room", field="layers", retry_after_s=2.5)


def _refuse(*_: object, **__: object) -> Any:
    raise _WHY


def _failed_later(*_: object, **__: object) -> Any:
    """A server that starts, and says some time after that it cannot go on."""
    running = asyncio.get_running_loop()
    failed: asyncio.Future[MeshError] = running.create_future()
    failed.set_result(_WHY)

    async def start() -> None:
        """There is nothing to start."""

    return SimpleNamespace(start=start, failed=failed, drained=running.create_future())


@pytest.mark.parametrize("make", [_refuse, _failed_later])
def test_an_error_keeps_its_field_and_when_to_come_back_and_gains_the_node(
    monkeypatch: pytest.MonkeyPatch, make: Any
) -> None:
    monkeypatch.setattr(expert_service.actor.Checkpoint, "open", lambda path: path)
    monkeypatch.setattr(expert_service.actor, "ExpertServer", make)
    host = ExpertServerHost(_OPTIONS, "127.0.0.1", "10.0.0.5 (abc)")

    with pytest.raises(NoRoomError) as caught:
        host.endpoint()
    with pytest.raises(NoRoomError) as again:
        host.status()

    for error in (caught.value, pickle.loads(pickle.dumps(again.value))):
        assert (error.message, error.field, error.retry_after_s) == (
            "node 10.0.0.5 (abc): no room", "layers", 2.5,
        )  # fmt: skip
    assert caught.value is not again.value, "nothing grows with each time that it is asked"


def test_a_ping_is_answered_when_the_event_loop_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expert_service.actor.Checkpoint, "open", _refuse)
    host = ExpertServerHost(_OPTIONS, "127.0.0.1", "n")

    turned: list[str] = []
    loop.shared_loop().call_soon_threadsafe(turned.append, "before")
    host.ping()
    assert turned == ["before"], "what the loop had to do before is done"
