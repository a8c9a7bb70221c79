"""Frames wait for credit in their order, and none is lost."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from expertmesh.codec import frames
from expertmesh.rpc.credit import CreditGate
from expertmesh.v1 import expert_pb2, router_pb2, tensor_pb2


@pytest.fixture
def sent() -> list[int]:
    return []


@pytest.fixture
def gate(sent: list[int]) -> CreditGate:
    def send(frame_id: int, messages: Iterator[bytes]) -> None:
        assert list(messages) == [b"x"]
        sent.append(frame_id)

    return CreditGate(send)


def put(gate: CreditGate, *frame_ids: int, size: int = 1) -> None:
    for frame_id in frame_ids:
        gate.put(frame_id, size, iter((b"x",)))


def test_frames_beyond_the_number_granted_wait_for_answers(gate, sent) -> None:
    gate.grant(2, 100)

    put(gate, 1, 2, 3, 4)
    assert sent == [1, 2]
    assert gate.done(2)

    assert sent == [1, 2, 3]


def test_frames_beyond_the_bytes_granted_wait_and_keep_their_order(gate, sent) -> None:
    gate.grant(10, 100)

    put(gate, 1, size=60)
    put(gate, 2, size=60)
    put(gate, 3, size=1)  # would fit, but its turn is later
    assert sent == [1]
    gate.done(1)

    assert sent == [1, 2, 3]


def test_a_frame_larger_than_the_credit_goes_alone(gate, sent) -> None:
    gate.grant(10, 100)

    put(gate, 1, size=1)
    put(gate, 2, size=1000)
    put(gate, 3, size=1)
    assert sent == [1]
    gate.done(1)
    assert sent == [1, 2]
    gate.done(2)

    assert sent == [1, 2, 3]


def test_a_frame_given_up_while_it_waits_is_never_sent(gate, sent) -> None:
    gate.grant(1, 100)

    put(gate, 1, 2, 3)

    assert not gate.done(2)
    assert gate.done(1)
    assert sent == [1, 3]


def test_a_larger_credit_lets_what_waits_through(gate, sent) -> None:
    gate.grant(1, 100)
    put(gate, 1, 2, 3)

    gate.grant(3, 100)

    assert sent == [1, 2, 3]


def test_until_a_server_has_given_credit_a_default_holds(gate, sent) -> None:
    put(gate, *range(300))
    assert len(sent) == 256

    gate.grant(300, 100_000)

    assert sent == list(range(300))


def test_a_credit_of_nothing_still_lets_one_frame_through(gate, sent) -> None:
    gate.grant(0, 0)

    put(gate, 1, 2)

    assert sent == [1]


def test_a_credit_is_what_generated_code_writes() -> None:
    buffer = frames.encode_credit(1024, 1 << 28)

    credit = tensor_pb2.FrameCredit(frames=1024, bytes=1 << 28)
    assert buffer == router_pb2.ForwardStreamResponse(credit=credit).SerializeToString()
    assert buffer == expert_pb2.ExecuteStreamResponse(credit=credit).SerializeToString()
    assert frames.decode(buffer) == frames.Credit(0, 1024, 1 << 28)
