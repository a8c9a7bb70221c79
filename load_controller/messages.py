"""What the controller's messages say, as its own types; and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import cast, get_args

import numpy as np
import torch

from expertmesh import gating
from expertmesh.codec.slots import layer_slots
from expertmesh.codec.tensors import NUMBER_BY_DTYPE
from expertmesh.errors import ConfigError, InvalidRequestError
from expertmesh.model import GateSpec, GroupScore, Score, Slot
from expertmesh.v1 import control_pb2 as pb
from expertmesh.v1 import router_pb2, tensor_pb2
from load_controller.balancer import Balancer
from load_controller.divergence import Gate
from load_controller.scaling import Scaling


def gates_of(request: pb.WatchClusterRequest) -> dict[int, Gate]:
    """The gates that a router brings, by layer. Raises InvalidRequestError."""
    gates = {}
    for entry in request.gates:
        if entry.score not in get_args(Score) or entry.group_score not in get_args(GroupScore):
            raise InvalidRequestError(
                f"the gate of layer {entry.layer} scores by {entry.score!r} and "
                f"{entry.group_score!r}: unknown here",
                field="gates",
            )
        spec = GateSpec(
            score=cast(Score, entry.score),
            top_k=entry.top_k,
            n_group=entry.n_group,
            topk_group=entry.topk_group,
            group_score=cast(GroupScore, entry.group_score),
        )
        try:
            gating.check_gate(spec, len(entry.trained_bias))
        except ConfigError as error:
            raise InvalidRequestError(error.message, field="gates") from None
        trained = torch.tensor(list(entry.trained_bias), dtype=torch.float32, device="cpu")
        gates[entry.layer] = Gate(spec, trained)
    return gates


def scores_of(
    request: pb.ReportAssignmentsRequest, gates: Mapping[int, Gate]
) -> dict[int, torch.Tensor]:
    """The sampled scores [n, E] of a report, by layer. Raises InvalidRequestError.

    Samples of layers whose gate is not known are left out: nothing could be judged by them.
    """
    return {
        sample.layer: _scores(sample.layer, sample.scores, len(gates[sample.layer].trained_bias))
        for sample in request.samples
        if sample.layer in gates
    }


def _scores(layer: int, tensor: tensor_pb2.Tensor, experts: int) -> torch.Tensor:
    float32 = NUMBER_BY_DTYPE[torch.float32]
    shape = tuple(tensor.shape)
    rows = shape[0] if len(shape) == 2 else -1
    if (
        tensor.data_type != float32
        or shape != (rows, experts)
        or len(tensor.data) != 4 * rows * experts
    ):
        raise InvalidRequestError(
            f"the sample of layer {layer} has shape {list(shape)} in {len(tensor.data)} bytes, "
            f"expected [n, {experts}] float32",
            field="samples",
        )
    return torch.from_numpy(np.frombuffer(tensor.data, np.float32).reshape(shape).copy())


def bias_update(version: int, balancer: Balancer) -> pb.BiasUpdate:
    """Every delta that is not all zero, as that version."""
    return pb.BiasUpdate(
        version=version,
        mode=balancer.mode,
        layers=[
            pb.LayerBias(layer=layer, delta=state.delta.tolist())
            for layer, state in sorted(balancer.layers.items())
            if bool(torch.count_nonzero(state.delta))
        ],
    )


def layer_balances(balancer: Balancer) -> list[router_pb2.LayerBalance]:
    """How each layer is balanced, ascending by index."""
    return [
        router_pb2.LayerBalance(
            layer=layer,
            windows=state.windows,
            window_max_violation=state.violation,
            divergence=state.measured.value,
            sampled_picks=state.measured.picks,
            max_abs_delta=float(state.delta.abs().max()),
            halvings=state.halvings,
            withdrawals=state.withdrawals,
        )
        for layer, state in sorted(balancer.layers.items())
    ]


def with_rate(server: router_pb2.ServerStatus, rate: float) -> router_pb2.ServerStatus:
    """What a server said of itself, with the speed that it counts with."""
    shown = router_pb2.ServerStatus()
    shown.CopyFrom(server)
    shown.rate = rate
    return shown


def fleet(
    servers: Mapping[str, pb.AnnounceServerRequest],
    shown: Mapping[str, frozenset[Slot]],
    loads: Mapping[str, pb.DeviceLoad],
    epoch: int,
    scaling: Scaling,
    rate_of: Callable[[str], float],
    now: float,
) -> pb.GetFleetResponse:
    """Every server by name: as it announced itself, what it is shown to hold, how busy it is."""
    bounds = scaling.bounds
    return pb.GetFleetResponse(
        servers=[
            pb.FleetServer(
                server=with_rate(entry.server, rate_of(name)),
                layers=layer_slots(shown[name]),
                load=loads.get(name),
            )
            for name, entry in sorted(servers.items())
        ],
        epoch=epoch,
        bounds=pb.ServerBounds(min_replicas=bounds.min_replicas, max_replicas=bounds.max_replicas),
        lease_owner=scaling.holder(now),
        report=scaling.report,
    )
