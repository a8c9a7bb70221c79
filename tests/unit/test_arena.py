"""Shared memory is mapped only by who proves to be on the same host, as the same user."""

from __future__ import annotations

import fcntl
import gc
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from expertmesh.codec.references import Blocks
from expertmesh.codec.tensors import TensorPart
from expertmesh.errors import InvalidRequestError
from expertmesh.rpc import arena as arenas
from expertmesh.rpc.arena import HEADER_BYTES, Arena, NotSharedError, open_offered
from expertmesh.rpc.borrowing import Borrower, Lease
from expertmesh.v1.tensor_pb2 import SharedMemoryOffer

SIZE = 1 << 20
MOST = 1 << 30


@pytest.fixture
def arena() -> Iterator[Arena]:
    made = Arena(SIZE)
    yield made
    made.close()


def changed(arena: Arena, **fields: object) -> SharedMemoryOffer:
    offer = arena.offer()
    for name, value in fields.items():
        setattr(offer, name, value)
    return offer


def test_both_ends_see_the_same_bytes(arena: Arena) -> None:
    peer = open_offered(arena.offer(), MOST)

    arena.view(HEADER_BYTES, 4)[:] = [1, 2, 3, 4]
    peer.view(HEADER_BYTES + 2, 2)[:] = [7, 8]

    assert peer.view(HEADER_BYTES, 4).tolist() == [1, 2, 7, 8]
    assert arena.view(HEADER_BYTES, 4).tolist() == [1, 2, 7, 8]


FALSE_OFFERS: dict[str, tuple[dict[str, object], str]] = {
    "of another host": ({"boot_id": "0" * 36}, "another host"),
    "without a host": ({"boot_id": ""}, "another host"),
    "with a wrong nonce": ({"nonce": bytes(32)}, "another nonce"),
    "with a short nonce": ({"nonce": b""}, "another nonce"),
    "of a process that is not there": ({"pid": 1 << 22}, "cannot be opened"),
    "of a negative process": ({"pid": -1}, "cannot be opened"),
    "of a file that is not open": ({"fd": 1 << 20}, "cannot be opened"),
    "of another size": ({"size": SIZE - 4096}, "no memory of"),
    "beyond the limit": ({"size": MOST + 4096}, "at most"),
    "of nothing": ({"size": 0}, "at most"),
}


@pytest.mark.parametrize(("fields", "says"), FALSE_OFFERS.values(), ids=FALSE_OFFERS)
def test_a_false_offer_is_refused_with_the_reason(
    arena: Arena, fields: dict[str, object], says: str
) -> None:
    with pytest.raises(NotSharedError, match=says):
        open_offered(changed(arena, **fields), MOST)


def test_memory_of_another_user_is_refused(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    other = os.geteuid() + 1
    monkeypatch.setattr(os, "geteuid", lambda: other)

    with pytest.raises(NotSharedError, match="another user"):
        open_offered(arena.offer(), MOST)


def test_memory_that_its_owner_could_shrink_is_refused(arena: Arena) -> None:
    """Whoever touches what has been cut off is killed by SIGBUS."""
    fd = os.memfd_create("unsealed", os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, SIZE)
        with pytest.raises(NotSharedError, match="not sealed"):
            open_offered(changed(arena, fd=fd), MOST)
    finally:
        os.close(fd)


def test_the_owner_itself_can_no_longer_shrink_or_unseal_it(arena: Arena) -> None:
    with pytest.raises(PermissionError):
        os.ftruncate(arena.fd, 4096)
    with pytest.raises(PermissionError):
        fcntl.fcntl(arena.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)


def test_what_is_no_memory_is_not_even_opened(
    arena: Arena, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To open a device or a pipe can have effects, or wait for ever."""
    os.mkfifo(tmp_path / "pipe")
    fd = os.open(tmp_path / "pipe", os.O_RDWR)
    monkeypatch.setattr(os, "open", lambda *_, **__: pytest.fail("opened"))
    try:
        with pytest.raises(NotSharedError, match="no memory"):
            open_offered(changed(arena, fd=fd), MOST)
    finally:
        os.close(fd)


def test_a_system_without_such_memory_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*_: object) -> int:
        raise OSError("no")

    monkeypatch.setattr(os, "memfd_create", absent)

    with pytest.raises(NotSharedError, match="no memfd"):
        Arena(SIZE)


def mapped() -> int:
    return Path("/proc/self/maps").read_text().count("memfd:expertmesh")


def test_nothing_stays_mapped_or_open_once_both_ends_and_every_view_are_gone() -> None:
    maps, files = mapped(), len(os.listdir("/proc/self/fd"))
    arena = Arena(SIZE)
    peer = open_offered(arena.offer(), MOST)
    view = peer.view(HEADER_BYTES, 100)
    arena.close()
    del arena, peer

    assert mapped() == maps + 1  # the view's
    assert view.sum() == 0
    del view
    assert (mapped(), len(os.listdir("/proc/self/fd"))) == (maps, files)


def test_released_pages_are_the_systems_again(arena: Arena) -> None:
    peer = open_offered(arena.offer(), MOST)
    arena.view(HEADER_BYTES, SIZE // 2)[:] = 1
    touched = os.fstat(arena.fd).st_blocks

    arena.release(HEADER_BYTES + SIZE // 2)

    assert os.fstat(arena.fd).st_blocks < touched // 10
    assert peer.view(HEADER_BYTES, 10).tolist() == [0] * 10
    open_offered(arena.offer(), MOST)  # the header is still there


def part(length: int) -> TensorPart:
    return TensorPart(torch.float32, (length // 4,), length, 0, b"", 0)


OUTSIDE = {
    "header": Blocks(0, 64),
    "end": Blocks(SIZE - 64, 128),
    "overflow": Blocks((1 << 64) - 64, 128),
    "unaligned": Blocks(HEADER_BYTES + 4, 128),
    "too short": Blocks(HEADER_BYTES, 124),
    "answer in the header": Blocks(HEADER_BYTES, 128, 64, 128),
    "answer beyond the end": Blocks(HEADER_BYTES, 128, HEADER_BYTES, SIZE),
    "answer unaligned": Blocks(HEADER_BYTES, 128, HEADER_BYTES + 1, 4),
}


@pytest.mark.parametrize("blocks", OUTSIDE.values(), ids=OUTSIDE)
def test_blocks_that_are_not_the_callers_to_lend_are_refused(arena: Arena, blocks: Blocks) -> None:
    borrower = Borrower(arena)

    with pytest.raises(InvalidRequestError, match="blocks"):
        borrower.borrow(blocks, part(blocks.length if blocks.length == 64 else 128))


def test_elements_both_in_the_message_and_in_blocks_are_refused(arena: Arena) -> None:
    half = TensorPart(torch.float32, (32,), 128, 64, bytes(64), 0)

    with pytest.raises(InvalidRequestError, match="expected none beside blocks"):
        Borrower(arena).borrow(Blocks(HEADER_BYTES, 128), half)


@pytest.mark.parametrize("first", ["the callback", "the death"])
def test_a_lease_ends_once_when_the_last_view_has_died(first: str) -> None:
    rows, room = np.zeros(4, np.uint8), np.zeros(4, np.uint8)
    lease, calls = Lease((rows, room)), []
    tensor = torch.from_numpy(rows)[1:]
    del rows, room
    if first == "the callback":
        lease.when_ended(lambda: calls.append(1))
        assert calls == []
        del tensor
    else:
        del tensor
        lease.when_ended(lambda: calls.append(1))

    assert calls == [1]


def test_a_lease_whose_views_die_on_another_thread_ends_there_or_here_but_once() -> None:
    for _ in range(300):
        views = [np.zeros(1, np.uint8) for _ in range(2)]
        lease, calls = Lease(tuple(views)), []
        kill: Callable[[], None] = views.clear
        thread = threading.Thread(target=kill)
        thread.start()
        lease.when_ended(lambda calls=calls: calls.append(1))
        thread.join()
        gc.collect(0)
        assert calls == [1]


def test_every_arena_has_a_nonce_of_its_own() -> None:
    made = [Arena(SIZE) for _ in range(2)]
    offers = [arena.offer() for arena in made]
    for arena in made:
        arena.close()

    assert offers[0].nonce != offers[1].nonce
    assert offers[0].boot_id == arenas._boot_id() != ""
