"""Errors on unary RPCs: google.rpc.Status with ErrorInfo, BadRequest and RetryInfo."""

from __future__ import annotations

import grpc
import grpc.aio
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from expertmesh.errors import (
    DOMAIN,
    MeshError,
    MessageTooLargeError,
    MismatchError,
    from_wire,
)


def to_status(error: MeshError) -> grpc.Status:
    """The status, with details, that says this error to any gRPC client."""
    info = error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN)
    details = [_packed(info)]
    if error.field:
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=error.field, description=error.message
        )
        details.append(_packed(error_details_pb2.BadRequest(field_violations=[violation])))
    if error.retry_after_s:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(int(error.retry_after_s * 1e9))
        details.append(_packed(error_details_pb2.RetryInfo(retry_delay=delay)))
    status = status_pb2.Status(code=error.code.value[0], message=error.message, details=details)
    return rpc_status.to_status(status)


def from_call(error: grpc.aio.AioRpcError, peer: str) -> MeshError:
    """The error that a failed RPC to `peer` means."""
    reason, field, retry_after_s = "", "", 0.0
    for key, value in error.trailing_metadata() or ():
        if key != "grpc-status-details-bin":
            continue
        raw = value if isinstance(value, bytes) else value.encode()
        try:
            for detail in status_pb2.Status.FromString(raw).details:
                reason, field, retry_after_s = _read(detail, reason, field, retry_after_s)
        except DecodeError:  # not of ours: the status code says enough
            continue
    message = error.details() or error.code().name
    if not reason and error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger" in message:
        return MessageTooLargeError(f"{message}: send fewer rows at a time")
    if error.code() is grpc.StatusCode.UNIMPLEMENTED:
        return MismatchError(
            f"{peer} does not know this call ({message}): is it that service, and of this release?"
        )
    if not reason:  # gRPC itself speaks: say about whom
        message = f"{peer}: {message}"
    return from_wire(error.code(), reason, message, field, retry_after_s)


def _packed(message: object) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(message)  # type: ignore[arg-type]
    return packed


def _read(
    detail: any_pb2.Any, reason: str, field: str, retry_after_s: float
) -> tuple[str, str, float]:
    info, bad, retry = (
        error_details_pb2.ErrorInfo(),
        error_details_pb2.BadRequest(),
        error_details_pb2.RetryInfo(),
    )
    if detail.Unpack(info) and info.domain == DOMAIN:
        return info.reason, field, retry_after_s
    if detail.Unpack(bad) and bad.field_violations:
        return reason, bad.field_violations[0].field, retry_after_s
    if detail.Unpack(retry):
        return reason, field, retry.retry_delay.ToNanoseconds() / 1e9
    return reason, field, retry_after_s
