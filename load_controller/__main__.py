"""`python -m load_controller`: the load controller without Ray."""

from __future__ import annotations

import argparse
import sys

import uvloop

from expertmesh.config import BalanceConfig, RpcConfig, rebalance_config
from expertmesh.rpc.process import exit_code, run_until_signal, say_listening, setup_logging
from load_controller.server import ControllerServer


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m load_controller",
        description="Keeps a cluster's directory, load counts and expert biases.",
        epilog="example: python -m load_controller --state state.sqlite --port 50050",
    )
    parser.add_argument("--state", required=True, help="SQLite file; made when absent")
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address that peers can reach; of 0.0.0.0 or :: this host's own",
    )
    parser.add_argument("--port", type=int, default=0, help="0: the last one, or any free port")
    parser.add_argument("--balance", default="frozen", help="frozen, adaptive or off")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a setting of BalanceConfig, as max_delta=0.1; may be repeated",
    )
    parser.add_argument(
        "--rebalance",
        nargs="?",
        const="",
        metavar="NAME=VALUE,...",
        help="let experts move by themselves where servers have unequally much to do",
    )
    parser.add_argument(
        "--server-rates",
        default="equal",
        help="equal, or measured: faster servers get more rows and more of the hot experts",
    )
    parser.add_argument("--metrics-port", type=int, help="serve /metrics there; 0 for any port")
    return parser.parse_args(argv)


async def _serve(arguments: argparse.Namespace) -> None:
    server = ControllerServer(
        arguments.state,
        host=arguments.host,
        balance=BalanceConfig.of(arguments.balance).with_settings(arguments.set),
        rebalance=rebalance_config(arguments.rebalance),
        server_rates=arguments.server_rates,
        rpc=RpcConfig(port=arguments.port),
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
