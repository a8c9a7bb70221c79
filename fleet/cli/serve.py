"""`expertmesh serve`: a cluster for as long as this command runs."""

from __future__ import annotations

import argparse
import json
from contextlib import ExitStack
from typing import get_args

from expertmesh.config import (
    AutoscaleConfig,
    BalanceConfig,
    DataConnectionMode,
    WireDtype,
    rebalance_config,
)
from fleet.cli.interrupts import Interrupts
from fleet.cli.output import emit, loading_bars
from fleet.launch import HUNG_AFTER_S, launch

NAME = "serve"
HELP = "Serve a Hugging Face MoE checkpoint until Ctrl-C, SIGTERM or `expertmesh down`."
EXAMPLES = """\
  expertmesh serve ./DeepSeek-V2-Lite --shards 2
  expertmesh serve ./model --shards 4 --replicas 2 --port 50051
  expertmesh serve ./model --balance adaptive --set max_delta=0.1 --set divergence_ceiling=0.05
  expertmesh serve ./model --ray-address auto --shards 8     # spread over a running Ray cluster
  expertmesh serve ./model --ray-address auto --controller 10.0.0.5:50050 --cpus-per-server 8
  expertmesh serve ./model --ray-address auto --cpus-per-server 8 --autoscale max_replicas=8
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own arguments."""
    parser.add_argument("checkpoint", help="folder with config.json and safetensors")
    parser.add_argument("--shards", type=int, default=2, help="parts of the model (2)")
    parser.add_argument("--replicas", type=int, default=1, help="servers for each part (1)")
    parser.add_argument("--routers", type=int, default=1, help="router processes (1)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--dtype", default="auto", help="auto, float32, float16 or bfloat16")
    parser.add_argument("--backend", default="auto", help="auto, onednn, reference or triton")
    parser.add_argument(
        "--weights",
        default="auto",
        help="int8; of FP8 files fp8-w8a16, fp8-w8a8, dequantised",
    )
    parser.add_argument("--numa", default="off", help="pin servers to NUMA nodes: off or auto")
    parser.add_argument("--port", type=int, default=50051, help="router port; 0 for any (50051)")
    parser.add_argument("--ray-address", default=None, help="join this Ray: auto or host:port")
    parser.add_argument(
        "--controller", default="", help="start only expert servers, for this one: host:port"
    )
    parser.add_argument(
        "--cpus-per-server", type=float, help="ask Ray for these and an expert_slot each"
    )
    parser.add_argument("--metrics-port", type=int, help="serve /metrics from this port on")
    parser.add_argument(
        "--shared-memory",
        choices=("auto", "off"),
        default="off",
        help="auto: routers share memory with expert servers of their node",
    )
    parser.add_argument(
        "--data-connections",
        choices=get_args(DataConnectionMode),
        default="auto",
        help="off: gRPC carries every byte; auto: TCP connections beside its streams do (auto)",
    )
    parser.add_argument(
        "--wire-dtype",
        choices=get_args(WireDtype),
        help="what travels between routers and expert servers; the caller's own type if not given",
    )
    parser.add_argument(
        "--hung-after-s",
        type=float,
        default=HUNG_AFTER_S,
        help=f"end and restart what answers nothing for so long; 0: never ({HUNG_AFTER_S:g})",
    )
    parser.add_argument("--balance", default="frozen", help="frozen, adaptive or off")
    parser.add_argument(
        "--autoscale",
        metavar="NAME=VALUE,...",
        help="add and remove servers with the load, as min_replicas=1,max_replicas=8",
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
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a setting of the balance, as divergence_ceiling=0.05; may be repeated",
    )


def run(arguments: argparse.Namespace) -> int:
    """Serves until a signal. The exit code."""
    interrupts = Interrupts()
    with ExitStack() as stack:
        with loading_bars(quiet=arguments.json, check=interrupts.check) as progress:
            cluster = stack.enter_context(
                launch(
                    arguments.checkpoint,
                    shards=arguments.shards,
                    replicas=arguments.replicas,
                    device=arguments.device,
                    dtype=arguments.dtype,
                    ray_address=arguments.ray_address,
                    port=arguments.port,
                    balance=BalanceConfig.of(arguments.balance).with_settings(arguments.set),
                    routers=arguments.routers,
                    backend=arguments.backend,
                    weights=arguments.weights,
                    numa=arguments.numa,
                    controller=arguments.controller,
                    cpus_per_server=arguments.cpus_per_server,
                    metrics_port=arguments.metrics_port,
                    autoscale=(
                        None
                        if arguments.autoscale is None
                        else AutoscaleConfig().with_settings(arguments.autoscale.split(","))
                    ),
                    rebalance=rebalance_config(arguments.rebalance),
                    server_rates=arguments.server_rates,
                    shared_memory=arguments.shared_memory,
                    data_connections=arguments.data_connections,
                    wire_dtype=arguments.wire_dtype,
                    hung_after_s=arguments.hung_after_s,
                    progress=progress,
                    command=NAME,
                )
            )
        endpoints = cluster.endpoints()
        interrupts.hold()  # whoever reads READY may send a signal at once: that ends well, too
        if arguments.json:
            ready = {"event": "READY", "address": cluster.address, "experts": endpoints}
            emit(json.dumps(ready))
        else:
            experts = " ".join(f"{name}={at}" for name, at in endpoints.items())
            emit(f"READY {cluster.address or 'experts'} {experts}")
        interrupts.wait()
    return 0
