"""What a server takes in at a time, and what it says when that is all."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from expertmesh.config import RpcConfig
from expertmesh.errors import OverloadedError, UnavailableError
from expertmesh.rpc.admission import OK, Admission


def _admission(**config: int) -> Admission:
    return Admission(RpcConfig(**config))  # type: ignore[arg-type]


def test_requests_are_refused_from_their_limit_on_and_taken_again_when_one_has_left() -> None:
    admission = _admission(max_inflight_frames=2)
    admission.enter(10)
    admission.enter(20)

    with pytest.raises(OverloadedError, match="2 requests are in flight, the limit is 2") as full:
        admission.enter(0)
    held = (admission.frames, admission.bytes)
    admission.leave(10)
    admission.enter(5)

    assert full.value.retry_after_s == 0.05
    assert held == (2, 30), "what was refused is not held"
    assert (admission.frames, admission.bytes) == (2, 25)


def test_bytes_may_reach_their_limit_and_not_pass_it() -> None:
    admission = _admission(max_inflight_bytes=100)
    admission.enter(60)
    admission.enter(40)
    admission.leave(40)

    with pytest.raises(OverloadedError, match="hold 60 bytes, the limit is 100") as full:
        admission.enter(41)

    assert full.value.retry_after_s == 0.05
    assert (admission.frames, admission.bytes) == (1, 60)


def test_a_request_larger_than_the_limit_is_taken_alone() -> None:
    admission = _admission(max_inflight_bytes=100)

    admission.enter(1000)

    with pytest.raises(OverloadedError):
        admission.enter(1)
    admission.leave(1000)
    admission.enter(0)  # takes no memory, so that the next may still be alone with all of it
    admission.enter(1000)


@pytest.mark.parametrize(
    ("config", "credit"),
    [
        ({}, (1024, 256 << 20)),
        ({"max_inflight_frames": 10, "max_inflight_bytes": 1000}, (5, 500)),
        ({"max_inflight_frames": 11, "max_inflight_bytes": 1001}, (5, 500)),
        ({"max_inflight_frames": 1, "max_inflight_bytes": 1000}, (1, 500)),
        ({"stream_frames": 7, "stream_bytes": 70}, (7, 70)),
    ],
    ids=["as set", "half of all", "rounded down", "one at least", "set lower"],
)
def test_a_stream_may_fill_at_most_half_of_what_a_server_takes(
    config: dict[str, int], credit: tuple[int, int]
) -> None:
    assert _admission(**config).credit == credit


def test_limits_are_those_of_the_configuration() -> None:
    admission = _admission(max_request_bytes=11, max_shared_bytes=22)

    assert (admission.max_request_bytes, admission.max_shared_bytes) == (11, 22)


def test_requests_are_counted_by_how_they_ended_and_unknown_ends_as_internal() -> None:
    admission = _admission()

    for outcome in (OK, OK, "QUEUE_FULL", "NOT_A_REASON"):
        admission.ended(outcome)

    ended = {outcome: count for outcome, count in admission.outcomes.items() if count}
    assert ended == {"OK": 2, "QUEUE_FULL": 1, "INTERNAL": 1}


def test_nothing_is_open_shared_or_draining_at_the_start() -> None:
    admission = _admission()

    assert (admission.frames, admission.bytes, admission.shared_streams) == (0, 0, 0)
    assert admission.draining is False
    assert set(admission.outcomes.values()) == {0}


def test_a_draining_server_sends_callers_elsewhere_and_waits_for_what_it_has() -> None:
    async def scenario() -> tuple[list[bool], UnavailableError, bool]:
        admission = _admission()
        admission.enter(1)
        admission.enter(1)
        stream: asyncio.Task[Any] = asyncio.ensure_future(asyncio.Event().wait())
        admission.streams.add(stream)
        drain = asyncio.ensure_future(admission.drain(30.0))
        done = []
        for _ in range(2):
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            done.append(drain.done())
            admission.leave(1)
        with pytest.raises(UnavailableError, match="stopping") as refused:
            admission.enter(1)
        await drain
        await asyncio.wait([stream])
        return done, refused.value, stream.cancelled()

    done, refused, ended = asyncio.run(scenario())

    assert done == [False, False]
    assert refused.retry_after_s == 1.0
    assert ended


def test_draining_with_nothing_in_flight_ends_at_once() -> None:
    async def scenario() -> bool:
        admission = _admission()
        await admission.drain(0.0)
        admission.draining = False
        admission.enter(1)
        admission.leave(1)
        await asyncio.wait_for(admission.drain(30.0), 5.0)
        return admission.draining

    assert asyncio.run(scenario())


def test_draining_gives_up_what_does_not_end_in_time(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> bool:
        admission = _admission()
        admission.enter(1)
        stream: asyncio.Task[Any] = asyncio.ensure_future(asyncio.Event().wait())
        admission.streams.add(stream)
        await asyncio.wait_for(admission.drain(0.01), 5.0)
        await asyncio.wait([stream])
        return stream.cancelled()

    assert asyncio.run(scenario())
    assert "1 requests in flight" in caplog.text
