"""Memory that two processes of one user on one host share: made by one, mapped by the other.

It is a memfd, which has no name: the kernel frees it with the last process that holds it, however
that ends. Who can open it through /proc has proved to be on the same host, in the same process
namespace, with the same user's rights.
"""

from __future__ import annotations

import fcntl
import hmac
import mmap
import os
import secrets
import stat
from pathlib import Path

import numpy as np
import numpy.typing as npt

from expertmesh.v1.tensor_pb2 import SharedMemoryOffer

HEADER_BYTES = 4096  # one page, which begins with the nonce; blocks are behind it
_NONCE_BYTES = 32
#: Without the first, an owner could shrink the memory and kill whoever then touches it (SIGBUS).
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")

Bytes = npt.NDArray[np.uint8]


class NotSharedError(Exception):
    """An offer cannot be taken; the message says why. Payloads then travel over TCP."""


class Memory:
    """A mapping of the whole memfd; it lasts as long as anything views it."""

    def __init__(self, fd: int, size: int) -> None:
        self.size = size
        self._map = mmap.mmap(fd, size)

    def view(self, offset: int, length: int) -> Bytes:
        """These bytes, as an array of its own: when it dies, nothing uses them any more."""
        if not length:
            return np.empty(0, np.uint8)
        return np.frombuffer(self._map, np.uint8, length, offset)

    def release(self, end: int) -> None:
        """Gives the pages between the header and `end` back to the system; they read as zeros."""
        end = min(self.size, -(-end // mmap.PAGESIZE) * mmap.PAGESIZE)
        if end > HEADER_BYTES:
            self._map.madvise(mmap.MADV_REMOVE, HEADER_BYTES, end - HEADER_BYTES)


class Arena(Memory):
    """The owner's end."""

    def __init__(self, size: int) -> None:
        """Raises NotSharedError where the system has no such memory."""
        size = max(2 * HEADER_BYTES, -(-size // mmap.PAGESIZE) * mmap.PAGESIZE)
        try:
            self.fd = os.memfd_create("expertmesh", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        except (AttributeError, OSError) as error:
            raise NotSharedError(f"no memfd can be made here: {error}") from None
        try:
            os.ftruncate(self.fd, size)
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, _SEALS | fcntl.F_SEAL_SEAL)
            super().__init__(self.fd, size)
        except (OSError, ValueError) as error:
            os.close(self.fd)
            raise NotSharedError(f"{size} bytes cannot be mapped: {error}") from None
        self._nonce = secrets.token_bytes(_NONCE_BYTES)
        self._map[:_NONCE_BYTES] = self._nonce

    def offer(self) -> SharedMemoryOffer:
        """What the other end needs to open it."""
        return SharedMemoryOffer(
            boot_id=_boot_id(), pid=os.getpid(), fd=self.fd, size=self.size, nonce=self._nonce
        )

    def close(self) -> None:
        """Nobody can open it any more; views go on. Once is enough."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def open_offered(offer: SharedMemoryOffer, max_bytes: int) -> Memory:
    """Maps what a peer offers. Raises NotSharedError with what does not hold."""
    if not offer.boot_id or offer.boot_id != _boot_id():
        raise NotSharedError("the peer is on another host")
    if not HEADER_BYTES < offer.size <= max_bytes:
        raise NotSharedError(f"{offer.size} bytes are offered, at most {max_bytes} are taken")
    path = f"/proc/{offer.pid}/fd/{offer.fd}"
    try:
        _require_ours(os.stat(path), offer.size)  # before it is opened: it might be a device
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError as error:
        raise NotSharedError(f"{path} cannot be opened: {error.strerror}") from None
    try:
        _require_ours(os.fstat(fd), offer.size)
        if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS != _SEALS:
            raise NotSharedError("the memory is not sealed against shrinking")
        memory = Memory(fd, offer.size)
    except (OSError, ValueError) as error:
        raise NotSharedError(f"{path} is no memory that can be mapped: {error}") from None
    finally:
        os.close(fd)
    nonce = memory.view(0, _NONCE_BYTES).tobytes()
    if len(offer.nonce) != _NONCE_BYTES or not hmac.compare_digest(nonce, offer.nonce):
        raise NotSharedError("the memory holds another nonce: it is another process's")
    return memory


def _require_ours(found: os.stat_result, size: int) -> None:
    if not stat.S_ISREG(found.st_mode) or found.st_size != size:
        raise NotSharedError(f"what is offered is no memory of {size} bytes")
    if found.st_uid != os.geteuid():
        raise NotSharedError("the memory is another user's")


def _boot_id() -> str:
    """Differs between hosts and after every start of one; empty where there is none."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return ""
