from expertmesh.v1 import tensor_pb2 as _tensor_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class LayerKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    LAYER_KIND_UNSPECIFIED: _ClassVar[LayerKind]
    LAYER_KIND_DENSE: _ClassVar[LayerKind]
    LAYER_KIND_MOE: _ClassVar[LayerKind]
LAYER_KIND_UNSPECIFIED: LayerKind
LAYER_KIND_DENSE: LayerKind
LAYER_KIND_MOE: LayerKind

class DescribeRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DescribeResponse(_message.Message):
    __slots__ = ("protocol_version", "checkpoint_digest", "model_type", "hidden_size", "layers", "routers", "compute_type")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    MODEL_TYPE_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_SIZE_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    ROUTERS_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_TYPE_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    checkpoint_digest: str
    model_type: str
    hidden_size: int
    layers: _containers.RepeatedCompositeFieldContainer[Layer]
    routers: _containers.RepeatedScalarFieldContainer[str]
    compute_type: _tensor_pb2.DataType
    def __init__(self, protocol_version: _Optional[int] = ..., checkpoint_digest: _Optional[str] = ..., model_type: _Optional[str] = ..., hidden_size: _Optional[int] = ..., layers: _Optional[_Iterable[_Union[Layer, _Mapping]]] = ..., routers: _Optional[_Iterable[str]] = ..., compute_type: _Optional[_Union[_tensor_pb2.DataType, str]] = ...) -> None: ...

class Layer(_message.Message):
    __slots__ = ("index", "kind", "num_experts", "top_k", "has_shared_expert", "intermediate_size", "shared_intermediate_size", "shared_gated", "activation", "gate")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    NUM_EXPERTS_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    HAS_SHARED_EXPERT_FIELD_NUMBER: _ClassVar[int]
    INTERMEDIATE_SIZE_FIELD_NUMBER: _ClassVar[int]
    SHARED_INTERMEDIATE_SIZE_FIELD_NUMBER: _ClassVar[int]
    SHARED_GATED_FIELD_NUMBER: _ClassVar[int]
    ACTIVATION_FIELD_NUMBER: _ClassVar[int]
    GATE_FIELD_NUMBER: _ClassVar[int]
    index: int
    kind: LayerKind
    num_experts: int
    top_k: int
    has_shared_expert: bool
    intermediate_size: int
    shared_intermediate_size: int
    shared_gated: bool
    activation: str
    gate: GateSettings
    def __init__(self, index: _Optional[int] = ..., kind: _Optional[_Union[LayerKind, str]] = ..., num_experts: _Optional[int] = ..., top_k: _Optional[int] = ..., has_shared_expert: bool = ..., intermediate_size: _Optional[int] = ..., shared_intermediate_size: _Optional[int] = ..., shared_gated: bool = ..., activation: _Optional[str] = ..., gate: _Optional[_Union[GateSettings, _Mapping]] = ...) -> None: ...

class GateSettings(_message.Message):
    __slots__ = ("score", "n_group", "topk_group", "group_score", "renormalize", "renormalize_eps", "scale", "logits_float32", "round_weights")
    SCORE_FIELD_NUMBER: _ClassVar[int]
    N_GROUP_FIELD_NUMBER: _ClassVar[int]
    TOPK_GROUP_FIELD_NUMBER: _ClassVar[int]
    GROUP_SCORE_FIELD_NUMBER: _ClassVar[int]
    RENORMALIZE_FIELD_NUMBER: _ClassVar[int]
    RENORMALIZE_EPS_FIELD_NUMBER: _ClassVar[int]
    SCALE_FIELD_NUMBER: _ClassVar[int]
    LOGITS_FLOAT32_FIELD_NUMBER: _ClassVar[int]
    ROUND_WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    score: str
    n_group: int
    topk_group: int
    group_score: str
    renormalize: bool
    renormalize_eps: float
    scale: float
    logits_float32: bool
    round_weights: bool
    def __init__(self, score: _Optional[str] = ..., n_group: _Optional[int] = ..., topk_group: _Optional[int] = ..., group_score: _Optional[str] = ..., renormalize: bool = ..., renormalize_eps: _Optional[float] = ..., scale: _Optional[float] = ..., logits_float32: bool = ..., round_weights: bool = ...) -> None: ...

class ForwardRequest(_message.Message):
    __slots__ = ("layer", "hidden_states", "expert_ids", "expert_weights", "non_finite_policy", "include_shared", "want_detail", "hidden_states_scale")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_STATES_FIELD_NUMBER: _ClassVar[int]
    EXPERT_IDS_FIELD_NUMBER: _ClassVar[int]
    EXPERT_WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    NON_FINITE_POLICY_FIELD_NUMBER: _ClassVar[int]
    INCLUDE_SHARED_FIELD_NUMBER: _ClassVar[int]
    WANT_DETAIL_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_STATES_SCALE_FIELD_NUMBER: _ClassVar[int]
    layer: int
    hidden_states: _tensor_pb2.Tensor
    expert_ids: _tensor_pb2.Tensor
    expert_weights: _tensor_pb2.Tensor
    non_finite_policy: _tensor_pb2.NonFinitePolicy
    include_shared: bool
    want_detail: bool
    hidden_states_scale: _tensor_pb2.Tensor
    def __init__(self, layer: _Optional[int] = ..., hidden_states: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., expert_ids: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., expert_weights: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., non_finite_policy: _Optional[_Union[_tensor_pb2.NonFinitePolicy, str]] = ..., include_shared: bool = ..., want_detail: bool = ..., hidden_states_scale: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ...) -> None: ...

class ForwardResponse(_message.Message):
    __slots__ = ("hidden_states", "expert_ids", "expert_weights", "bias_version", "epoch", "retried_pairs", "hidden_states_scale")
    HIDDEN_STATES_FIELD_NUMBER: _ClassVar[int]
    EXPERT_IDS_FIELD_NUMBER: _ClassVar[int]
    EXPERT_WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    BIAS_VERSION_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    RETRIED_PAIRS_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_STATES_SCALE_FIELD_NUMBER: _ClassVar[int]
    hidden_states: _tensor_pb2.Tensor
    expert_ids: _tensor_pb2.Tensor
    expert_weights: _tensor_pb2.Tensor
    bias_version: int
    epoch: int
    retried_pairs: int
    hidden_states_scale: _tensor_pb2.Tensor
    def __init__(self, hidden_states: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., expert_ids: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., expert_weights: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., bias_version: _Optional[int] = ..., epoch: _Optional[int] = ..., retried_pairs: _Optional[int] = ..., hidden_states_scale: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ...) -> None: ...

class ForwardStreamRequest(_message.Message):
    __slots__ = ("frame_id", "forward", "chunk", "cancel", "timeout_us", "traceparent", "blocks", "takes_credit")
    FRAME_ID_FIELD_NUMBER: _ClassVar[int]
    FORWARD_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_US_FIELD_NUMBER: _ClassVar[int]
    TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    TAKES_CREDIT_FIELD_NUMBER: _ClassVar[int]
    frame_id: int
    forward: ForwardRequest
    chunk: _tensor_pb2.TensorChunk
    cancel: CancelFrame
    timeout_us: int
    traceparent: str
    blocks: _tensor_pb2.SharedBlocks
    takes_credit: bool
    def __init__(self, frame_id: _Optional[int] = ..., forward: _Optional[_Union[ForwardRequest, _Mapping]] = ..., chunk: _Optional[_Union[_tensor_pb2.TensorChunk, _Mapping]] = ..., cancel: _Optional[_Union[CancelFrame, _Mapping]] = ..., timeout_us: _Optional[int] = ..., traceparent: _Optional[str] = ..., blocks: _Optional[_Union[_tensor_pb2.SharedBlocks, _Mapping]] = ..., takes_credit: bool = ...) -> None: ...

class CancelFrame(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ForwardStreamResponse(_message.Message):
    __slots__ = ("frame_id", "forward", "chunk", "error", "returned", "credit", "shared")
    FRAME_ID_FIELD_NUMBER: _ClassVar[int]
    FORWARD_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    RETURNED_FIELD_NUMBER: _ClassVar[int]
    CREDIT_FIELD_NUMBER: _ClassVar[int]
    SHARED_FIELD_NUMBER: _ClassVar[int]
    frame_id: int
    forward: ForwardResponse
    chunk: _tensor_pb2.TensorChunk
    error: _tensor_pb2.FrameError
    returned: _tensor_pb2.FrameReturned
    credit: _tensor_pb2.FrameCredit
    shared: bool
    def __init__(self, frame_id: _Optional[int] = ..., forward: _Optional[_Union[ForwardResponse, _Mapping]] = ..., chunk: _Optional[_Union[_tensor_pb2.TensorChunk, _Mapping]] = ..., error: _Optional[_Union[_tensor_pb2.FrameError, _Mapping]] = ..., returned: _Optional[_Union[_tensor_pb2.FrameReturned, _Mapping]] = ..., credit: _Optional[_Union[_tensor_pb2.FrameCredit, _Mapping]] = ..., shared: bool = ...) -> None: ...

class GetLoadRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetLoadResponse(_message.Message):
    __slots__ = ("layers", "bias_version", "epoch", "balance")
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    BIAS_VERSION_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    BALANCE_FIELD_NUMBER: _ClassVar[int]
    layers: _containers.RepeatedCompositeFieldContainer[LayerLoad]
    bias_version: int
    epoch: int
    balance: _containers.RepeatedCompositeFieldContainer[LayerBalance]
    def __init__(self, layers: _Optional[_Iterable[_Union[LayerLoad, _Mapping]]] = ..., bias_version: _Optional[int] = ..., epoch: _Optional[int] = ..., balance: _Optional[_Iterable[_Union[LayerBalance, _Mapping]]] = ...) -> None: ...

class LayerBalance(_message.Message):
    __slots__ = ("layer", "windows", "window_max_violation", "divergence", "sampled_picks", "max_abs_delta", "halvings", "withdrawals")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    WINDOWS_FIELD_NUMBER: _ClassVar[int]
    WINDOW_MAX_VIOLATION_FIELD_NUMBER: _ClassVar[int]
    DIVERGENCE_FIELD_NUMBER: _ClassVar[int]
    SAMPLED_PICKS_FIELD_NUMBER: _ClassVar[int]
    MAX_ABS_DELTA_FIELD_NUMBER: _ClassVar[int]
    HALVINGS_FIELD_NUMBER: _ClassVar[int]
    WITHDRAWALS_FIELD_NUMBER: _ClassVar[int]
    layer: int
    windows: int
    window_max_violation: float
    divergence: float
    sampled_picks: int
    max_abs_delta: float
    halvings: int
    withdrawals: int
    def __init__(self, layer: _Optional[int] = ..., windows: _Optional[int] = ..., window_max_violation: _Optional[float] = ..., divergence: _Optional[float] = ..., sampled_picks: _Optional[int] = ..., max_abs_delta: _Optional[float] = ..., halvings: _Optional[int] = ..., withdrawals: _Optional[int] = ...) -> None: ...

class LayerLoad(_message.Message):
    __slots__ = ("layer", "counts", "caller_gated_counts", "max_violation", "top_k", "repeated_pairs")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    COUNTS_FIELD_NUMBER: _ClassVar[int]
    CALLER_GATED_COUNTS_FIELD_NUMBER: _ClassVar[int]
    MAX_VIOLATION_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    REPEATED_PAIRS_FIELD_NUMBER: _ClassVar[int]
    layer: int
    counts: _containers.RepeatedScalarFieldContainer[int]
    caller_gated_counts: _containers.RepeatedScalarFieldContainer[int]
    max_violation: float
    top_k: int
    repeated_pairs: int
    def __init__(self, layer: _Optional[int] = ..., counts: _Optional[_Iterable[int]] = ..., caller_gated_counts: _Optional[_Iterable[int]] = ..., max_violation: _Optional[float] = ..., top_k: _Optional[int] = ..., repeated_pairs: _Optional[int] = ...) -> None: ...

class GetStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetStatusResponse(_message.Message):
    __slots__ = ("ready", "reason", "servers", "bias_version", "epoch", "controller_connected", "controller", "pid", "balance_mode", "answered_requests", "retried_pairs", "controller_age_s", "balance_alive", "window_age_s", "divergence", "problem")
    READY_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    SERVERS_FIELD_NUMBER: _ClassVar[int]
    BIAS_VERSION_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    CONTROLLER_CONNECTED_FIELD_NUMBER: _ClassVar[int]
    CONTROLLER_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    BALANCE_MODE_FIELD_NUMBER: _ClassVar[int]
    ANSWERED_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    RETRIED_PAIRS_FIELD_NUMBER: _ClassVar[int]
    CONTROLLER_AGE_S_FIELD_NUMBER: _ClassVar[int]
    BALANCE_ALIVE_FIELD_NUMBER: _ClassVar[int]
    WINDOW_AGE_S_FIELD_NUMBER: _ClassVar[int]
    DIVERGENCE_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    ready: bool
    reason: str
    servers: _containers.RepeatedCompositeFieldContainer[ServerStatus]
    bias_version: int
    epoch: int
    controller_connected: bool
    controller: str
    pid: int
    balance_mode: str
    answered_requests: int
    retried_pairs: int
    controller_age_s: float
    balance_alive: bool
    window_age_s: float
    divergence: float
    problem: str
    def __init__(self, ready: bool = ..., reason: _Optional[str] = ..., servers: _Optional[_Iterable[_Union[ServerStatus, _Mapping]]] = ..., bias_version: _Optional[int] = ..., epoch: _Optional[int] = ..., controller_connected: bool = ..., controller: _Optional[str] = ..., pid: _Optional[int] = ..., balance_mode: _Optional[str] = ..., answered_requests: _Optional[int] = ..., retried_pairs: _Optional[int] = ..., controller_age_s: _Optional[float] = ..., balance_alive: bool = ..., window_age_s: _Optional[float] = ..., divergence: _Optional[float] = ..., problem: _Optional[str] = ...) -> None: ...

class ServerStatus(_message.Message):
    __slots__ = ("server_id", "endpoint", "incarnation", "state", "connected", "slots", "loaded_bytes", "total_bytes", "pid", "node", "backend", "error", "requests_in_flight", "answered_rows", "transport", "pairs_per_s", "rate", "suspected")
    SERVER_ID_FIELD_NUMBER: _ClassVar[int]
    ENDPOINT_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    CONNECTED_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    LOADED_BYTES_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    BACKEND_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_IN_FLIGHT_FIELD_NUMBER: _ClassVar[int]
    ANSWERED_ROWS_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    PAIRS_PER_S_FIELD_NUMBER: _ClassVar[int]
    RATE_FIELD_NUMBER: _ClassVar[int]
    SUSPECTED_FIELD_NUMBER: _ClassVar[int]
    server_id: str
    endpoint: str
    incarnation: str
    state: str
    connected: bool
    slots: int
    loaded_bytes: int
    total_bytes: int
    pid: int
    node: str
    backend: str
    error: str
    requests_in_flight: int
    answered_rows: int
    transport: str
    pairs_per_s: float
    rate: float
    suspected: bool
    def __init__(self, server_id: _Optional[str] = ..., endpoint: _Optional[str] = ..., incarnation: _Optional[str] = ..., state: _Optional[str] = ..., connected: bool = ..., slots: _Optional[int] = ..., loaded_bytes: _Optional[int] = ..., total_bytes: _Optional[int] = ..., pid: _Optional[int] = ..., node: _Optional[str] = ..., backend: _Optional[str] = ..., error: _Optional[str] = ..., requests_in_flight: _Optional[int] = ..., answered_rows: _Optional[int] = ..., transport: _Optional[str] = ..., pairs_per_s: _Optional[float] = ..., rate: _Optional[float] = ..., suspected: bool = ...) -> None: ...
