"""`python -m router_service`: one router without Ray."""

from __future__ import annotations

import argparse
import sys
from typing import get_args

import uvloop

from expertmesh.config import (
    DataConnectionMode,
    RouterConfig,
    RpcConfig,
    SharedMemoryConfig,
    WireDtype,
)
from expertmesh.rpc.address import parse_address
from expertmesh.rpc.process import exit_code, run_until_signal, say_listening, setup_logging
from router_service.server import RouterServer, open_model


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m router_service",
        description="Gates tokens and spreads them over the expert servers of a load controller.",
        epilog="example: python -m router_service CHECKPOINT --controller HOST:PORT --port 50051",
    )
    parser.add_argument("checkpoint", help="folder of a Hugging Face checkpoint (gates are read)")
    parser.add_argument("--controller", required=True, help="load controller, host:port")
    parser.add_argument("--router-id", default="router-0", help="stable name of this router")
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address that clients can reach; of 0.0.0.0 or :: this host's own",
    )
    parser.add_argument("--port", type=int, default=0, help="0 for any free port")
    parser.add_argument(
        "--shared-memory",
        choices=("auto", "off"),
        default="off",
        help="auto: share memory with expert servers of this host and user (default off)",
    )
    parser.add_argument(
        "--wire-dtype",
        choices=get_args(WireDtype),
        help="what hidden states travel as to and from expert servers; their own type if not given",
    )
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


async def _serve(arguments: argparse.Namespace) -> None:
    controller = str(parse_address(arguments.controller, "--controller"))
    server = RouterServer(
        open_model(arguments.checkpoint),
        router_id=arguments.router_id,
        controller=controller,
        host=arguments.host,
        rpc=RpcConfig(
            port=arguments.port,
            data_connections=arguments.data_connections,
            data_port=arguments.data_port,
        ),
        config=RouterConfig(
            shared_memory=SharedMemoryConfig(mode=arguments.shared_memory),
            data_connections=arguments.data_connections,
            wire_dtype=arguments.wire_dtype,
        ),
        metrics_port=arguments.metrics_port,
    )
    await run_until_signal(server, lambda: say_listening(server.address, server.metrics_address))


def main(argv: list[str] | None = None) -> int:
    """Runs until a signal. The exit code."""
    arguments = _arguments(argv)
    setup_logging()
    return exit_code(lambda: uvloop.run(_serve(arguments)))


if __name__ == "__main__":
    sys.exit(main())
