"""A server that sends every tensor back over our own streams, and what it is asked.

python benchmarks/stream_echo.py                    # prints LISTENING host:port
"""

from __future__ import annotations

import asyncio

import numpy as np
import torch
import uvloop

from expertmesh.codec.messages import (
    EXECUTE_REQUEST,
    EXECUTE_RESPONSE,
    ExecuteRequest,
    ExecuteResponse,
)
from expertmesh.config import RpcConfig
from expertmesh.rpc.admission import Admission
from expertmesh.rpc.data_port import DataPort
from expertmesh.rpc.deadline import Deadline
from expertmesh.rpc.process import settle_memory
from expertmesh.rpc.served_frames import FrameProtocol
from expertmesh.rpc.server import GrpcServer, stream_tensor

SERVICE = "echo.TensorEcho"
_WIDTH = 2048


def echo_request(size: int) -> ExecuteRequest:
    """A request with that many bytes of bf16 hidden states, the same for the same size."""
    generator = torch.Generator().manual_seed(size)
    hidden = torch.randn(size // 2 // _WIDTH, _WIDTH, generator=generator).bfloat16()
    return ExecuteRequest(
        layer=0,
        hidden_states=hidden,
        expert_ids=np.zeros((len(hidden), 1), np.int32),
        expert_weights=np.ones((len(hidden), 1), np.float32),
    )


async def _echo(request: ExecuteRequest, _: Deadline) -> ExecuteResponse:
    return ExecuteResponse(hidden_states=request.hidden_states)


async def _serve() -> None:
    config = RpcConfig(host="127.0.0.1")
    admission = Admission(config)
    port = DataPort.of(config)
    protocol = FrameProtocol(EXECUTE_REQUEST, EXECUTE_RESPONSE, _echo, admission, data_port=port)
    server = GrpcServer(config, admission, data_port=port)
    server.add(SERVICE, {"Stream": stream_tensor(protocol)})
    # No reflection of a service that has no .proto: bind and listen, no more.
    await server.start()
    settle_memory()
    print(f"LISTENING 127.0.0.1:{server.port}", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(_serve())
