"""What a launch refuses before Ray starts."""

from __future__ import annotations

import math
import os
from pathlib import Path

from expert_service.kernels import BACKENDS, DEVICES, WEIGHTS
from expertmesh.config import AutoscaleConfig, RebalanceConfig
from expertmesh.errors import ConfigError
from expertmesh.rpc.address import parse_address

_LAST_PORT = 65535


def checked_path(checkpoint: str | Path) -> Path:
    """The folder, absolute; whether it is there is for the checkpoint to say.

    Links in it stay as they are: every node follows its own, and one whose link leads to a local
    copy has the checkpoint under the same path.
    """
    if not isinstance(checkpoint, str | os.PathLike):
        raise ConfigError(f"checkpoint is {checkpoint!r}, expected the path of a folder")
    try:
        return Path(checkpoint).expanduser().absolute()
    except (OSError, RuntimeError) as error:  # no home folder, or the current one is gone
        raise ConfigError(f"checkpoint is {str(checkpoint)!r}: {error}") from None


def check_ray_address(address: str | None) -> None:
    """Raises ConfigError for what is neither None nor "auto" nor the "host:port" of a Ray."""
    if address not in (None, "auto"):
        parse_address(address, "ray_address")


def check_choices(port: int, routers: int, backend: str, device: str, weights: str) -> None:
    """Raises ConfigError for a port, backend, device or treatment of weights that cannot be."""
    if not isinstance(port, int) or not 0 <= port <= _LAST_PORT - routers + 1:
        raise ConfigError(f"port is {port!r}, expected 0 to {_LAST_PORT}")
    if backend not in BACKENDS:
        raise ConfigError(f"backend is {backend!r}, expected one of {', '.join(BACKENDS)}")
    if device not in DEVICES:
        raise ConfigError(f"device is {device!r}, expected {', '.join(DEVICES)}")
    if weights not in WEIGHTS:
        raise ConfigError(f"weights is {weights!r}, expected one of {', '.join(WEIGHTS)}")


def check_counts(**counts: int) -> None:
    """Raises ConfigError for a number of things that is not a positive integer."""
    for name, value in counts.items():
        if not isinstance(value, int) or value < 1:
            raise ConfigError(f"{name} is {value!r}, expected an integer of at least 1")


def check_seconds(**times: float) -> None:
    """Raises ConfigError for a time that is no number of seconds, or negative."""
    for name, value in times.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not 0 <= value < math.inf:
            raise ConfigError(f"{name} is {value!r}, expected seconds, 0 or more")


def check_autoscale(
    config: AutoscaleConfig,
    shards: int,
    replicas: int,
    ray_address: str | None,
    cpus_per_server: float | None,
    rebalance: RebalanceConfig | None,
) -> None:
    """Raises ConfigError where servers could not come and go as configured."""
    if rebalance is not None and rebalance.redundant is not None:
        raise ConfigError(
            f"rebalance.redundant is {rebalance.redundant}, but with autoscale the supervisor says "
            "how many redundant slots there are (min_redundant, max_redundant): leave it out"
        )
    if ray_address is None or cpus_per_server is None:
        raise ConfigError(
            "autoscale needs ray_address, a Ray whose autoscaler adds nodes, and cpus_per_server, "
            "what each server asks of it"
        )
    first = shards * replicas
    if not config.min_replicas <= first <= config.max_replicas:
        raise ConfigError(
            f"{first} servers to begin with (shards x replicas) are not within min_replicas = "
            f"{config.min_replicas} and max_replicas = {config.max_replicas}"
        )
