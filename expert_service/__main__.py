"""`python -m expert_service`: one expert server without Ray."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from typing import get_args

# Before torch is loaded: threads that wait sleep, and leave the cores to those that compute whole
# experts, and to the other services of the host.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import uvloop

from expert_service.server import ExpertServer, Placing
from expertmesh.checkpoint import Checkpoint
from expertmesh.config import DataConnectionMode, RpcConfig
from expertmesh.errors import ConfigError, MeshError
from expertmesh.placement import initial_parts
from expertmesh.rpc.address import parse_address
from expertmesh.rpc.process import exit_code, run_until_signal, say_listening, setup_logging


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m expert_service",
        description="Serves one shard of a checkpoint's experts over gRPC.",
        epilog="example: python -m expert_service CHECKPOINT --shard 0/2 --controller HOST:PORT",
    )
    parser.add_argument("checkpoint", help="folder of a Hugging Face checkpoint")
    parser.add_argument("--shard", default="0/1", help="which part of how many, e.g. 0/2")
    parser.add_argument("--server-id", default="", help="stable name; default shard-N")
    parser.add_argument("--controller", default="", help="load controller, host:port")
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address that routers can reach; of 0.0.0.0 or :: this host's own",
    )
    parser.add_argument("--port", type=int, default=0, help="0 for any free port")
    parser.add_argument("--backend", default="auto", help="auto, onednn, reference or triton")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--dtype", default="auto", help="auto, float32, float16 or bfloat16")
    parser.add_argument(
        "--weights",
        default="auto",
        help="int8; of FP8 checkpoints fp8-w8a16, fp8-w8a8, dequantised",
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU threads for computing")
    parser.add_argument("--numa", default="off", help="pin to a NUMA node: off, auto or its number")
    parser.add_argument(
        "--data-connections",
        choices=get_args(DataConnectionMode),
        default="auto",
        help="off: gRPC carries every byte; auto: TCP connections beside its streams do (auto)",
    )
    parser.add_argument(
        "--data-port", type=int, default=0, help="where they are taken; 0 for any free port"
    )
    parser.add_argument("--metrics-port", type=int, help="serve /metrics there; 0 for any port")
    return parser.parse_args(argv)


def parse_shard(text: str) -> tuple[int, int]:
    """(index, count) of "index/count". Raises ConfigError."""
    index, _, count = text.partition("/")
    if not (index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise ConfigError(f"--shard is {text!r}, expected index/count, for example 0/2")
    return int(index), int(count)


async def _serve(arguments: argparse.Namespace) -> None:
    index, count = parse_shard(arguments.shard)
    if arguments.controller:
        parse_address(arguments.controller, "--controller")
    checkpoint = Checkpoint.open(arguments.checkpoint)
    server = ExpertServer(
        checkpoint,
        initial_parts(checkpoint.spec, count)[index],
        Placing(
            server_id=arguments.server_id or f"shard-{index}",
            host=arguments.host,
            controller=arguments.controller,
        ),
        backend=arguments.backend,
        device=arguments.device,
        dtype=arguments.dtype,
        threads=arguments.threads,
        weights=arguments.weights,
        numa=arguments.numa,
        rpc=RpcConfig(
            port=arguments.port,
            data_connections=arguments.data_connections,
            data_port=arguments.data_port,
        ),
        metrics_port=arguments.metrics_port,
    )
    await run_until_signal(
        server, lambda: say_listening(server.endpoint, server.metrics_address), _ended(server)
    )


async def _ended(server: ExpertServer) -> MeshError | None:
    """Why the server can never serve, or None once it was told to drain."""
    await asyncio.wait((server.failed, server.drained), return_when=asyncio.FIRST_COMPLETED)
    return server.failed.result() if server.failed.done() else None


def main(argv: list[str] | None = None) -> int:
    """Runs until a signal. The exit code."""
    arguments = _arguments(argv)
    setup_logging()
    return exit_code(lambda: uvloop.run(_serve(arguments)))


if __name__ == "__main__":
    sys.exit(main())
