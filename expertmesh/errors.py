"""Every error a user can see, and what each one looks like on the wire.

MeshError
├── InvalidRequestError        the request is wrong: do not retry
│   ├── NonFiniteError         hidden states or weights hold NaN or infinity
│   ├── UnknownLayerError      no such layer in this model
│   └── MessageTooLargeError   more bytes than the server takes
├── StaleEpochError            planned with a placement that is gone
├── SlotNotHeldError           the server does not hold that expert
├── MismatchError              another checkpoint or protocol version
├── SupersededError            a newer incarnation has taken this name
├── OverloadedError            a queue is full
├── NoRoomError                slots do not fit into the memory that is free
├── MigratingError             experts are being moved already
├── LeaseLostError             somebody else adds and removes servers
├── UnavailableError           nobody who could answer can be reached
├── DeadlineError              the answer would have come too late
├── CancelledRequestError      the caller gave the request up
├── InternalError              our fault; carries an incident id
└── ConfigError                the process or the call cannot start (never on the wire)
    └── CheckpointError        the checkpoint cannot be served
"""

from __future__ import annotations

from typing import ClassVar, Self

import grpc

DOMAIN = "expertmesh"


class MeshError(Exception):
    """Base of every error a user can see.

    `message` says what was wrong, the value, what was expected and what to do. `field` names the
    request field at fault; `retry_after_s` is how long to wait before a retry that may help.
    """

    code: ClassVar[grpc.StatusCode] = grpc.StatusCode.UNKNOWN
    reason: ClassVar[str] = ""

    def __init__(self, message: str, *, field: str = "", retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        self.retry_after_s = retry_after_s

    def again(self, message: str = "") -> Self:
        """The same error, or in other words, to be raised without what the first one's traceback
        holds alive."""
        return type(self)(
            message or self.message, field=self.field, retry_after_s=self.retry_after_s
        )


class InvalidRequestError(MeshError):
    """The caller's tensors, ids or options are wrong."""

    code = grpc.StatusCode.INVALID_ARGUMENT
    reason = "INVALID_REQUEST"


class NonFiniteError(InvalidRequestError):
    """Hidden states or gate weights hold NaN or infinity, and the request did not allow it."""

    reason = "NON_FINITE"


class UnknownLayerError(InvalidRequestError):
    """The layer is not a feed-forward layer of the served model."""

    code = grpc.StatusCode.NOT_FOUND
    reason = "UNKNOWN_LAYER"


class MessageTooLargeError(InvalidRequestError):
    """The request holds more bytes than the server takes at once."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    reason = "MESSAGE_TOO_LARGE"


class StaleEpochError(MeshError):
    """The request was planned with a placement that no router uses any more."""

    code = grpc.StatusCode.FAILED_PRECONDITION
    reason = "STALE_EPOCH"


class SlotNotHeldError(MeshError):
    """The server does not hold an expert that the request names."""

    code = grpc.StatusCode.FAILED_PRECONDITION
    reason = "SLOT_NOT_HELD"


class MismatchError(MeshError):
    """The two ends serve different checkpoints or speak different protocol versions."""

    code = grpc.StatusCode.FAILED_PRECONDITION
    reason = "FLEET_MISMATCH"


class SupersededError(MeshError):
    """A newer incarnation of the same server has announced itself."""

    code = grpc.StatusCode.FAILED_PRECONDITION
    reason = "SUPERSEDED"


class OverloadedError(MeshError):
    """A queue is full; another replica, or a later try, may have room."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    reason = "QUEUE_FULL"


class NoRoomError(MeshError):
    """Slots that a server shall load do not fit into the memory that is free there."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    reason = "NO_ROOM"


class MigratingError(MeshError):
    """Experts are being moved already; one migration at a time."""

    code = grpc.StatusCode.FAILED_PRECONDITION
    reason = "MIGRATING"


class LeaseLostError(MeshError):
    """Another owner adds and removes servers; one at a time."""

    code = grpc.StatusCode.FAILED_PRECONDITION
    reason = "LEASE_LOST"


class UnavailableError(MeshError):
    """Nobody who could answer can be reached now; a later try may succeed."""

    code = grpc.StatusCode.UNAVAILABLE
    reason = "UNAVAILABLE"


class DeadlineError(MeshError):
    """The deadline passed before the answer was complete."""

    code = grpc.StatusCode.DEADLINE_EXCEEDED
    reason = "DEADLINE_EXCEEDED"


class CancelledRequestError(MeshError):
    """The caller gave the request up."""

    code = grpc.StatusCode.CANCELLED
    reason = "CANCELLED"


class InternalError(MeshError):
    """Our fault. The message carries an incident id that the server's log explains."""

    code = grpc.StatusCode.INTERNAL
    reason = "INTERNAL"


class ConfigError(MeshError):
    """The process, or the call, cannot start with this configuration."""

    code = grpc.StatusCode.UNKNOWN
    reason = ""


class CheckpointError(ConfigError):
    """The checkpoint cannot be served: the message names the file and the tensor."""


#: Every error that crosses the wire, by its reason.
BY_REASON: dict[str, type[MeshError]] = {
    error.reason: error
    for error in (
        InvalidRequestError,
        NonFiniteError,
        UnknownLayerError,
        MessageTooLargeError,
        StaleEpochError,
        SlotNotHeldError,
        MismatchError,
        SupersededError,
        OverloadedError,
        NoRoomError,
        MigratingError,
        LeaseLostError,
        UnavailableError,
        DeadlineError,
        CancelledRequestError,
        InternalError,
    )
}

#: What a status code means when it carries no reason of ours (a proxy, or gRPC itself, said it).
_BY_CODE: dict[grpc.StatusCode, type[MeshError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequestError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: OverloadedError,
    grpc.StatusCode.UNAVAILABLE: UnavailableError,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineError,
    grpc.StatusCode.CANCELLED: CancelledRequestError,
}

CODE_BY_NUMBER: dict[int, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}


def from_wire(
    code: grpc.StatusCode | int,
    reason: str,
    message: str,
    field: str = "",
    retry_after_s: float = 0.0,
) -> MeshError:
    """The error that a peer meant.

    An unknown reason falls back to what its status code means, and at last to `InternalError`.
    """
    if isinstance(code, int):
        code = CODE_BY_NUMBER.get(code, grpc.StatusCode.UNKNOWN)
    kind = BY_REASON.get(reason) or _BY_CODE.get(code) or InternalError
    return kind(message or code.name, field=field, retry_after_s=retry_after_s)
