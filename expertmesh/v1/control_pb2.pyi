from expertmesh.v1 import expert_pb2 as _expert_pb2
from expertmesh.v1 import router_pb2 as _router_pb2
from expertmesh.v1 import tensor_pb2 as _tensor_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class MoveAction(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    MOVE_ACTION_UNSPECIFIED: _ClassVar[MoveAction]
    MOVE_ACTION_LOAD: _ClassVar[MoveAction]
    MOVE_ACTION_DROP: _ClassVar[MoveAction]
MOVE_ACTION_UNSPECIFIED: MoveAction
MOVE_ACTION_LOAD: MoveAction
MOVE_ACTION_DROP: MoveAction

class MigrateSlotsRequest(_message.Message):
    __slots__ = ("moves", "fence")
    MOVES_FIELD_NUMBER: _ClassVar[int]
    FENCE_FIELD_NUMBER: _ClassVar[int]
    moves: _containers.RepeatedCompositeFieldContainer[SlotMove]
    fence: int
    def __init__(self, moves: _Optional[_Iterable[_Union[SlotMove, _Mapping]]] = ..., fence: _Optional[int] = ...) -> None: ...

class DrainServerRequest(_message.Message):
    __slots__ = ("server_id", "moves", "fence")
    SERVER_ID_FIELD_NUMBER: _ClassVar[int]
    MOVES_FIELD_NUMBER: _ClassVar[int]
    FENCE_FIELD_NUMBER: _ClassVar[int]
    server_id: str
    moves: _containers.RepeatedCompositeFieldContainer[SlotMove]
    fence: int
    def __init__(self, server_id: _Optional[str] = ..., moves: _Optional[_Iterable[_Union[SlotMove, _Mapping]]] = ..., fence: _Optional[int] = ...) -> None: ...

class DrainServerResponse(_message.Message):
    __slots__ = ("loaded",)
    LOADED_FIELD_NUMBER: _ClassVar[int]
    loaded: int
    def __init__(self, loaded: _Optional[int] = ...) -> None: ...

class GetFleetRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetFleetResponse(_message.Message):
    __slots__ = ("servers", "epoch", "bounds", "lease_owner", "report", "rebalance")
    SERVERS_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    BOUNDS_FIELD_NUMBER: _ClassVar[int]
    LEASE_OWNER_FIELD_NUMBER: _ClassVar[int]
    REPORT_FIELD_NUMBER: _ClassVar[int]
    REBALANCE_FIELD_NUMBER: _ClassVar[int]
    servers: _containers.RepeatedCompositeFieldContainer[FleetServer]
    epoch: int
    bounds: ServerBounds
    lease_owner: str
    report: ScalingReport
    rebalance: RebalanceReport
    def __init__(self, servers: _Optional[_Iterable[_Union[FleetServer, _Mapping]]] = ..., epoch: _Optional[int] = ..., bounds: _Optional[_Union[ServerBounds, _Mapping]] = ..., lease_owner: _Optional[str] = ..., report: _Optional[_Union[ScalingReport, _Mapping]] = ..., rebalance: _Optional[_Union[RebalanceReport, _Mapping]] = ...) -> None: ...

class RebalanceReport(_message.Message):
    __slots__ = ("enabled", "reason", "layers", "done", "failed", "loaded", "age_s")
    ENABLED_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    LOADED_FIELD_NUMBER: _ClassVar[int]
    AGE_S_FIELD_NUMBER: _ClassVar[int]
    enabled: bool
    reason: str
    layers: _containers.RepeatedCompositeFieldContainer[LayerViolation]
    done: int
    failed: int
    loaded: int
    age_s: float
    def __init__(self, enabled: bool = ..., reason: _Optional[str] = ..., layers: _Optional[_Iterable[_Union[LayerViolation, _Mapping]]] = ..., done: _Optional[int] = ..., failed: _Optional[int] = ..., loaded: _Optional[int] = ..., age_s: _Optional[float] = ...) -> None: ...

class LayerViolation(_message.Message):
    __slots__ = ("layer", "max_violation", "planned")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    MAX_VIOLATION_FIELD_NUMBER: _ClassVar[int]
    PLANNED_FIELD_NUMBER: _ClassVar[int]
    layer: int
    max_violation: float
    planned: float
    def __init__(self, layer: _Optional[int] = ..., max_violation: _Optional[float] = ..., planned: _Optional[float] = ...) -> None: ...

class SetRebalancingRequest(_message.Message):
    __slots__ = ("enabled",)
    ENABLED_FIELD_NUMBER: _ClassVar[int]
    enabled: bool
    def __init__(self, enabled: bool = ...) -> None: ...

class SetRebalancingResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class FleetServer(_message.Message):
    __slots__ = ("server", "layers", "load")
    SERVER_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    server: _router_pb2.ServerStatus
    layers: _containers.RepeatedCompositeFieldContainer[_expert_pb2.LayerSlots]
    load: DeviceLoad
    def __init__(self, server: _Optional[_Union[_router_pb2.ServerStatus, _Mapping]] = ..., layers: _Optional[_Iterable[_Union[_expert_pb2.LayerSlots, _Mapping]]] = ..., load: _Optional[_Union[DeviceLoad, _Mapping]] = ...) -> None: ...

class DeviceLoad(_message.Message):
    __slots__ = ("uptime_us", "busy_us", "ongoing_us", "ongoing", "queue_delays")
    UPTIME_US_FIELD_NUMBER: _ClassVar[int]
    BUSY_US_FIELD_NUMBER: _ClassVar[int]
    ONGOING_US_FIELD_NUMBER: _ClassVar[int]
    ONGOING_FIELD_NUMBER: _ClassVar[int]
    QUEUE_DELAYS_FIELD_NUMBER: _ClassVar[int]
    uptime_us: int
    busy_us: int
    ongoing_us: int
    ongoing: int
    queue_delays: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, uptime_us: _Optional[int] = ..., busy_us: _Optional[int] = ..., ongoing_us: _Optional[int] = ..., ongoing: _Optional[int] = ..., queue_delays: _Optional[_Iterable[int]] = ...) -> None: ...

class ServerBounds(_message.Message):
    __slots__ = ("min_replicas", "max_replicas")
    MIN_REPLICAS_FIELD_NUMBER: _ClassVar[int]
    MAX_REPLICAS_FIELD_NUMBER: _ClassVar[int]
    min_replicas: int
    max_replicas: int
    def __init__(self, min_replicas: _Optional[int] = ..., max_replicas: _Optional[int] = ...) -> None: ...

class ScalingReport(_message.Message):
    __slots__ = ("replicas", "reason", "slots", "configured", "starting", "problem")
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    CONFIGURED_FIELD_NUMBER: _ClassVar[int]
    STARTING_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    replicas: int
    reason: str
    slots: int
    configured: ServerBounds
    starting: int
    problem: str
    def __init__(self, replicas: _Optional[int] = ..., reason: _Optional[str] = ..., slots: _Optional[int] = ..., configured: _Optional[_Union[ServerBounds, _Mapping]] = ..., starting: _Optional[int] = ..., problem: _Optional[str] = ...) -> None: ...

class SetServerBoundsRequest(_message.Message):
    __slots__ = ("bounds",)
    BOUNDS_FIELD_NUMBER: _ClassVar[int]
    bounds: ServerBounds
    def __init__(self, bounds: _Optional[_Union[ServerBounds, _Mapping]] = ...) -> None: ...

class SetServerBoundsResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class TakeLeaseRequest(_message.Message):
    __slots__ = ("owner", "seconds", "report")
    OWNER_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    REPORT_FIELD_NUMBER: _ClassVar[int]
    owner: str
    seconds: float
    report: ScalingReport
    def __init__(self, owner: _Optional[str] = ..., seconds: _Optional[float] = ..., report: _Optional[_Union[ScalingReport, _Mapping]] = ...) -> None: ...

class TakeLeaseResponse(_message.Message):
    __slots__ = ("fence",)
    FENCE_FIELD_NUMBER: _ClassVar[int]
    fence: int
    def __init__(self, fence: _Optional[int] = ...) -> None: ...

class SlotMove(_message.Message):
    __slots__ = ("action", "layer", "expert", "server_id")
    ACTION_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    EXPERT_FIELD_NUMBER: _ClassVar[int]
    SERVER_ID_FIELD_NUMBER: _ClassVar[int]
    action: MoveAction
    layer: int
    expert: int
    server_id: str
    def __init__(self, action: _Optional[_Union[MoveAction, str]] = ..., layer: _Optional[int] = ..., expert: _Optional[int] = ..., server_id: _Optional[str] = ...) -> None: ...

class MigrateSlotsResponse(_message.Message):
    __slots__ = ("epoch", "loaded", "dropped")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    LOADED_FIELD_NUMBER: _ClassVar[int]
    DROPPED_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    loaded: int
    dropped: int
    def __init__(self, epoch: _Optional[int] = ..., loaded: _Optional[int] = ..., dropped: _Optional[int] = ...) -> None: ...

class AnnounceServerRequest(_message.Message):
    __slots__ = ("server", "protocol_version", "checkpoint_digest", "started_at_ns", "layers", "initial_layers", "load")
    SERVER_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    STARTED_AT_NS_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    INITIAL_LAYERS_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    server: _router_pb2.ServerStatus
    protocol_version: int
    checkpoint_digest: str
    started_at_ns: int
    layers: _containers.RepeatedCompositeFieldContainer[_expert_pb2.LayerSlots]
    initial_layers: _containers.RepeatedCompositeFieldContainer[_expert_pb2.LayerSlots]
    load: DeviceLoad
    def __init__(self, server: _Optional[_Union[_router_pb2.ServerStatus, _Mapping]] = ..., protocol_version: _Optional[int] = ..., checkpoint_digest: _Optional[str] = ..., started_at_ns: _Optional[int] = ..., layers: _Optional[_Iterable[_Union[_expert_pb2.LayerSlots, _Mapping]]] = ..., initial_layers: _Optional[_Iterable[_Union[_expert_pb2.LayerSlots, _Mapping]]] = ..., load: _Optional[_Union[DeviceLoad, _Mapping]] = ...) -> None: ...

class AnnounceServerResponse(_message.Message):
    __slots__ = ("oldest_epoch", "layers")
    OLDEST_EPOCH_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    oldest_epoch: int
    layers: _containers.RepeatedCompositeFieldContainer[_expert_pb2.LayerSlots]
    def __init__(self, oldest_epoch: _Optional[int] = ..., layers: _Optional[_Iterable[_Union[_expert_pb2.LayerSlots, _Mapping]]] = ...) -> None: ...

class WatchClusterRequest(_message.Message):
    __slots__ = ("router_id", "incarnation", "endpoint", "protocol_version", "checkpoint_digest", "gates")
    ROUTER_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    ENDPOINT_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    GATES_FIELD_NUMBER: _ClassVar[int]
    router_id: str
    incarnation: str
    endpoint: str
    protocol_version: int
    checkpoint_digest: str
    gates: _containers.RepeatedCompositeFieldContainer[LayerGate]
    def __init__(self, router_id: _Optional[str] = ..., incarnation: _Optional[str] = ..., endpoint: _Optional[str] = ..., protocol_version: _Optional[int] = ..., checkpoint_digest: _Optional[str] = ..., gates: _Optional[_Iterable[_Union[LayerGate, _Mapping]]] = ...) -> None: ...

class LayerGate(_message.Message):
    __slots__ = ("layer", "score", "top_k", "n_group", "topk_group", "group_score", "trained_bias")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    N_GROUP_FIELD_NUMBER: _ClassVar[int]
    TOPK_GROUP_FIELD_NUMBER: _ClassVar[int]
    GROUP_SCORE_FIELD_NUMBER: _ClassVar[int]
    TRAINED_BIAS_FIELD_NUMBER: _ClassVar[int]
    layer: int
    score: str
    top_k: int
    n_group: int
    topk_group: int
    group_score: str
    trained_bias: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, layer: _Optional[int] = ..., score: _Optional[str] = ..., top_k: _Optional[int] = ..., n_group: _Optional[int] = ..., topk_group: _Optional[int] = ..., group_score: _Optional[str] = ..., trained_bias: _Optional[_Iterable[float]] = ...) -> None: ...

class WatchClusterResponse(_message.Message):
    __slots__ = ("directory", "placement", "bias", "beat")
    DIRECTORY_FIELD_NUMBER: _ClassVar[int]
    PLACEMENT_FIELD_NUMBER: _ClassVar[int]
    BIAS_FIELD_NUMBER: _ClassVar[int]
    BEAT_FIELD_NUMBER: _ClassVar[int]
    directory: Directory
    placement: Placement
    bias: BiasUpdate
    beat: BalanceBeat
    def __init__(self, directory: _Optional[_Union[Directory, _Mapping]] = ..., placement: _Optional[_Union[Placement, _Mapping]] = ..., bias: _Optional[_Union[BiasUpdate, _Mapping]] = ..., beat: _Optional[_Union[BalanceBeat, _Mapping]] = ...) -> None: ...

class BalanceBeat(_message.Message):
    __slots__ = ("number", "closed_windows", "window_age_s", "problem", "stalled")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    CLOSED_WINDOWS_FIELD_NUMBER: _ClassVar[int]
    WINDOW_AGE_S_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    STALLED_FIELD_NUMBER: _ClassVar[int]
    number: int
    closed_windows: int
    window_age_s: float
    problem: str
    stalled: bool
    def __init__(self, number: _Optional[int] = ..., closed_windows: _Optional[int] = ..., window_age_s: _Optional[float] = ..., problem: _Optional[str] = ..., stalled: bool = ...) -> None: ...

class Directory(_message.Message):
    __slots__ = ("version", "servers", "routers")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    SERVERS_FIELD_NUMBER: _ClassVar[int]
    ROUTERS_FIELD_NUMBER: _ClassVar[int]
    version: int
    servers: _containers.RepeatedCompositeFieldContainer[_router_pb2.ServerStatus]
    routers: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, version: _Optional[int] = ..., servers: _Optional[_Iterable[_Union[_router_pb2.ServerStatus, _Mapping]]] = ..., routers: _Optional[_Iterable[str]] = ...) -> None: ...

class Placement(_message.Message):
    __slots__ = ("epoch", "servers")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SERVERS_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    servers: _containers.RepeatedCompositeFieldContainer[ServerSlots]
    def __init__(self, epoch: _Optional[int] = ..., servers: _Optional[_Iterable[_Union[ServerSlots, _Mapping]]] = ...) -> None: ...

class ServerSlots(_message.Message):
    __slots__ = ("server_id", "layers", "rate")
    SERVER_ID_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    RATE_FIELD_NUMBER: _ClassVar[int]
    server_id: str
    layers: _containers.RepeatedCompositeFieldContainer[_expert_pb2.LayerSlots]
    rate: float
    def __init__(self, server_id: _Optional[str] = ..., layers: _Optional[_Iterable[_Union[_expert_pb2.LayerSlots, _Mapping]]] = ..., rate: _Optional[float] = ...) -> None: ...

class BiasUpdate(_message.Message):
    __slots__ = ("version", "mode", "layers")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    version: int
    mode: str
    layers: _containers.RepeatedCompositeFieldContainer[LayerBias]
    def __init__(self, version: _Optional[int] = ..., mode: _Optional[str] = ..., layers: _Optional[_Iterable[_Union[LayerBias, _Mapping]]] = ...) -> None: ...

class LayerBias(_message.Message):
    __slots__ = ("layer", "delta")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    DELTA_FIELD_NUMBER: _ClassVar[int]
    layer: int
    delta: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, layer: _Optional[int] = ..., delta: _Optional[_Iterable[float]] = ...) -> None: ...

class ReportAssignmentsRequest(_message.Message):
    __slots__ = ("source", "incarnation", "sequence", "layers", "bias_version", "epoch", "samples", "leaving")
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    BIAS_VERSION_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    LEAVING_FIELD_NUMBER: _ClassVar[int]
    source: str
    incarnation: str
    sequence: int
    layers: _containers.RepeatedCompositeFieldContainer[_router_pb2.LayerLoad]
    bias_version: int
    epoch: int
    samples: _containers.RepeatedCompositeFieldContainer[LayerSample]
    leaving: bool
    def __init__(self, source: _Optional[str] = ..., incarnation: _Optional[str] = ..., sequence: _Optional[int] = ..., layers: _Optional[_Iterable[_Union[_router_pb2.LayerLoad, _Mapping]]] = ..., bias_version: _Optional[int] = ..., epoch: _Optional[int] = ..., samples: _Optional[_Iterable[_Union[LayerSample, _Mapping]]] = ..., leaving: bool = ...) -> None: ...

class LayerSample(_message.Message):
    __slots__ = ("layer", "sampled_picks", "changed_picks", "scores")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    SAMPLED_PICKS_FIELD_NUMBER: _ClassVar[int]
    CHANGED_PICKS_FIELD_NUMBER: _ClassVar[int]
    SCORES_FIELD_NUMBER: _ClassVar[int]
    layer: int
    sampled_picks: int
    changed_picks: int
    scores: _tensor_pb2.Tensor
    def __init__(self, layer: _Optional[int] = ..., sampled_picks: _Optional[int] = ..., changed_picks: _Optional[int] = ..., scores: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ...) -> None: ...

class ReportAssignmentsResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ReportExecutionsRequest(_message.Message):
    __slots__ = ("source", "incarnation", "sequence", "layers")
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    source: str
    incarnation: str
    sequence: int
    layers: _containers.RepeatedCompositeFieldContainer[LayerExecutions]
    def __init__(self, source: _Optional[str] = ..., incarnation: _Optional[str] = ..., sequence: _Optional[int] = ..., layers: _Optional[_Iterable[_Union[LayerExecutions, _Mapping]]] = ...) -> None: ...

class LayerExecutions(_message.Message):
    __slots__ = ("layer", "counts")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    COUNTS_FIELD_NUMBER: _ClassVar[int]
    layer: int
    counts: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, layer: _Optional[int] = ..., counts: _Optional[_Iterable[int]] = ...) -> None: ...

class ReportExecutionsResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetClusterLoadRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetClusterLoadResponse(_message.Message):
    __slots__ = ("layers", "executions", "bias_version", "epoch", "balance", "routers", "beat", "balance_mode")
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    EXECUTIONS_FIELD_NUMBER: _ClassVar[int]
    BIAS_VERSION_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    BALANCE_FIELD_NUMBER: _ClassVar[int]
    ROUTERS_FIELD_NUMBER: _ClassVar[int]
    BEAT_FIELD_NUMBER: _ClassVar[int]
    BALANCE_MODE_FIELD_NUMBER: _ClassVar[int]
    layers: _containers.RepeatedCompositeFieldContainer[_router_pb2.LayerLoad]
    executions: _containers.RepeatedCompositeFieldContainer[LayerExecutions]
    bias_version: int
    epoch: int
    balance: _containers.RepeatedCompositeFieldContainer[_router_pb2.LayerBalance]
    routers: _containers.RepeatedCompositeFieldContainer[RouterState]
    beat: BalanceBeat
    balance_mode: str
    def __init__(self, layers: _Optional[_Iterable[_Union[_router_pb2.LayerLoad, _Mapping]]] = ..., executions: _Optional[_Iterable[_Union[LayerExecutions, _Mapping]]] = ..., bias_version: _Optional[int] = ..., epoch: _Optional[int] = ..., balance: _Optional[_Iterable[_Union[_router_pb2.LayerBalance, _Mapping]]] = ..., routers: _Optional[_Iterable[_Union[RouterState, _Mapping]]] = ..., beat: _Optional[_Union[BalanceBeat, _Mapping]] = ..., balance_mode: _Optional[str] = ...) -> None: ...

class RouterState(_message.Message):
    __slots__ = ("router_id", "endpoint", "bias_version", "epoch", "away_s")
    ROUTER_ID_FIELD_NUMBER: _ClassVar[int]
    ENDPOINT_FIELD_NUMBER: _ClassVar[int]
    BIAS_VERSION_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    AWAY_S_FIELD_NUMBER: _ClassVar[int]
    router_id: str
    endpoint: str
    bias_version: int
    epoch: int
    away_s: float
    def __init__(self, router_id: _Optional[str] = ..., endpoint: _Optional[str] = ..., bias_version: _Optional[int] = ..., epoch: _Optional[int] = ..., away_s: _Optional[float] = ...) -> None: ...

class SetBalanceModeRequest(_message.Message):
    __slots__ = ("mode", "reset")
    MODE_FIELD_NUMBER: _ClassVar[int]
    RESET_FIELD_NUMBER: _ClassVar[int]
    mode: str
    reset: bool
    def __init__(self, mode: _Optional[str] = ..., reset: bool = ...) -> None: ...

class SetBalanceModeResponse(_message.Message):
    __slots__ = ("bias_version",)
    BIAS_VERSION_FIELD_NUMBER: _ClassVar[int]
    bias_version: int
    def __init__(self, bias_version: _Optional[int] = ...) -> None: ...
