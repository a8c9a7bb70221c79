"""expertmesh: the feed-forward half of Mixture-of-Experts models, served as a cluster.

>>> import expertmesh
>>> with expertmesh.connect("localhost:50051") as mesh:  # doctest: +SKIP
...     output = mesh.forward(hidden, layer=3)
"""

from expertmesh.rpc import engine as _engine  # noqa: F401  first: it decides how grpc is imported

# isort: split
from expertmesh.client import AsyncMesh, Mesh, connect, connect_async
from expertmesh.config import BalanceConfig
from expertmesh.errors import (
    CancelledRequestError,
    CheckpointError,
    ConfigError,
    DeadlineError,
    InternalError,
    InvalidRequestError,
    LeaseLostError,
    MeshError,
    MessageTooLargeError,
    MigratingError,
    MismatchError,
    NonFiniteError,
    NoRoomError,
    OverloadedError,
    SlotNotHeldError,
    StaleEpochError,
    SupersededError,
    UnavailableError,
    UnknownLayerError,
)
from expertmesh.info import LayerInfo, MeshInfo, MeshLoad

__all__ = [
    "AsyncMesh",
    "BalanceConfig",
    "CancelledRequestError",
    "CheckpointError",
    "ConfigError",
    "DeadlineError",
    "InternalError",
    "InvalidRequestError",
    "LayerInfo",
    "LeaseLostError",
    "Mesh",
    "MeshError",
    "MeshInfo",
    "MeshLoad",
    "MessageTooLargeError",
    "MigratingError",
    "MismatchError",
    "NoRoomError",
    "NonFiniteError",
    "OverloadedError",
    "SlotNotHeldError",
    "StaleEpochError",
    "SupersededError",
    "UnavailableError",
    "UnknownLayerError",
    "connect",
    "connect_async",
]
