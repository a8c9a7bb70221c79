from expertmesh.v1 import tensor_pb2 as _tensor_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DrainRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DrainResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class LoadSlotsRequest(_message.Message):
    __slots__ = ("layers",)
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    layers: _containers.RepeatedCompositeFieldContainer[LayerSlots]
    def __init__(self, layers: _Optional[_Iterable[_Union[LayerSlots, _Mapping]]] = ...) -> None: ...

class LoadSlotsResponse(_message.Message):
    __slots__ = ("slot_digests",)
    SLOT_DIGESTS_FIELD_NUMBER: _ClassVar[int]
    slot_digests: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, slot_digests: _Optional[_Iterable[str]] = ...) -> None: ...

class DropSlotsRequest(_message.Message):
    __slots__ = ("layers",)
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    layers: _containers.RepeatedCompositeFieldContainer[LayerSlots]
    def __init__(self, layers: _Optional[_Iterable[_Union[LayerSlots, _Mapping]]] = ...) -> None: ...

class DropSlotsResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DescribeShardRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DescribeShardResponse(_message.Message):
    __slots__ = ("protocol_version", "checkpoint_digest", "server_id", "incarnation", "layers", "backend", "ready", "slot_digests")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    SERVER_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    BACKEND_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    SLOT_DIGESTS_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    checkpoint_digest: str
    server_id: str
    incarnation: str
    layers: _containers.RepeatedCompositeFieldContainer[LayerSlots]
    backend: str
    ready: bool
    slot_digests: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, protocol_version: _Optional[int] = ..., checkpoint_digest: _Optional[str] = ..., server_id: _Optional[str] = ..., incarnation: _Optional[str] = ..., layers: _Optional[_Iterable[_Union[LayerSlots, _Mapping]]] = ..., backend: _Optional[str] = ..., ready: bool = ..., slot_digests: _Optional[_Iterable[str]] = ...) -> None: ...

class LayerSlots(_message.Message):
    __slots__ = ("layer", "experts")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    layer: int
    experts: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, layer: _Optional[int] = ..., experts: _Optional[_Iterable[int]] = ...) -> None: ...

class ExecuteRequest(_message.Message):
    __slots__ = ("layer", "hidden_states", "expert_ids", "expert_weights", "epoch", "hidden_states_scale")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_STATES_FIELD_NUMBER: _ClassVar[int]
    EXPERT_IDS_FIELD_NUMBER: _ClassVar[int]
    EXPERT_WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_STATES_SCALE_FIELD_NUMBER: _ClassVar[int]
    layer: int
    hidden_states: _tensor_pb2.Tensor
    expert_ids: _tensor_pb2.Tensor
    expert_weights: _tensor_pb2.Tensor
    epoch: int
    hidden_states_scale: _tensor_pb2.Tensor
    def __init__(self, layer: _Optional[int] = ..., hidden_states: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., expert_ids: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., expert_weights: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., epoch: _Optional[int] = ..., hidden_states_scale: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ...) -> None: ...

class ExecuteResponse(_message.Message):
    __slots__ = ("hidden_states", "queue_us", "compute_us", "hidden_states_scale")
    HIDDEN_STATES_FIELD_NUMBER: _ClassVar[int]
    QUEUE_US_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_US_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_STATES_SCALE_FIELD_NUMBER: _ClassVar[int]
    hidden_states: _tensor_pb2.Tensor
    queue_us: int
    compute_us: int
    hidden_states_scale: _tensor_pb2.Tensor
    def __init__(self, hidden_states: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., queue_us: _Optional[int] = ..., compute_us: _Optional[int] = ..., hidden_states_scale: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ...) -> None: ...

class ExecuteStreamRequest(_message.Message):
    __slots__ = ("frame_id", "execute", "chunk", "cancel", "timeout_us", "traceparent", "blocks", "takes_credit")
    FRAME_ID_FIELD_NUMBER: _ClassVar[int]
    EXECUTE_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_US_FIELD_NUMBER: _ClassVar[int]
    TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    TAKES_CREDIT_FIELD_NUMBER: _ClassVar[int]
    frame_id: int
    execute: ExecuteRequest
    chunk: _tensor_pb2.TensorChunk
    cancel: CancelExecution
    timeout_us: int
    traceparent: str
    blocks: _tensor_pb2.SharedBlocks
    takes_credit: bool
    def __init__(self, frame_id: _Optional[int] = ..., execute: _Optional[_Union[ExecuteRequest, _Mapping]] = ..., chunk: _Optional[_Union[_tensor_pb2.TensorChunk, _Mapping]] = ..., cancel: _Optional[_Union[CancelExecution, _Mapping]] = ..., timeout_us: _Optional[int] = ..., traceparent: _Optional[str] = ..., blocks: _Optional[_Union[_tensor_pb2.SharedBlocks, _Mapping]] = ..., takes_credit: bool = ...) -> None: ...

class CancelExecution(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ExecuteStreamResponse(_message.Message):
    __slots__ = ("frame_id", "execute", "chunk", "error", "returned", "credit", "shared")
    FRAME_ID_FIELD_NUMBER: _ClassVar[int]
    EXECUTE_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    RETURNED_FIELD_NUMBER: _ClassVar[int]
    CREDIT_FIELD_NUMBER: _ClassVar[int]
    SHARED_FIELD_NUMBER: _ClassVar[int]
    frame_id: int
    execute: ExecuteResponse
    chunk: _tensor_pb2.TensorChunk
    error: _tensor_pb2.FrameError
    returned: _tensor_pb2.FrameReturned
    credit: _tensor_pb2.FrameCredit
    shared: bool
    def __init__(self, frame_id: _Optional[int] = ..., execute: _Optional[_Union[ExecuteResponse, _Mapping]] = ..., chunk: _Optional[_Union[_tensor_pb2.TensorChunk, _Mapping]] = ..., error: _Optional[_Union[_tensor_pb2.FrameError, _Mapping]] = ..., returned: _Optional[_Union[_tensor_pb2.FrameReturned, _Mapping]] = ..., credit: _Optional[_Union[_tensor_pb2.FrameCredit, _Mapping]] = ..., shared: bool = ...) -> None: ...
