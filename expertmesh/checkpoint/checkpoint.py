"""The feed-forward half of a Hugging Face checkpoint: checked at open, read slot by slot."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from expertmesh.checkpoint import fp8
from expertmesh.checkpoint.config import Config
from expertmesh.checkpoint.families import FAMILIES
from expertmesh.checkpoint.family import Family
from expertmesh.checkpoint.missing import explain
from expertmesh.checkpoint.safetensors_file import PIECE_BYTES, Pause, no_pause, pieces
from expertmesh.checkpoint.tensor_store import TensorStore, read_json
from expertmesh.errors import CheckpointError, ConfigError
from expertmesh.gating import check_gate
from expertmesh.model import (
    ExpertWeights,
    Fp8ExpertWeights,
    GateWeights,
    LayerSpec,
    ModelSpec,
    Slot,
)

_RUN_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


class Checkpoint:
    """An open checkpoint folder. Reading is thread-safe; close it, or use it in a `with`.

    Opening reads config.json and the headers of the weight files, and checks that every tensor of
    every served layer is there with the right shape. Other tensors (attention, multi-token
    prediction beyond `num_hidden_layers`) may be missing or in any format: nobody reads them.
    Raises CheckpointError, naming the file and the tensor or key.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._config = config = _read_config(path)
        self._family = FAMILIES[str(config.get("model_type"))]
        layers = tuple(_read_layers(config, self._family))
        self._tensors = TensorStore(path)
        try:
            self._block = self._read_block(layers)
            self.spec = ModelSpec(
                model_type=self._family.model_type,
                hidden_size=config.size("hidden_size"),
                dtype=self._run_dtype(config, layers[0]),
                layers=layers,
            )
            for layer in layers:
                self._check_layer(layer)
        except BaseException:
            self.close()
            raise

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Opens and checks a checkpoint folder."""
        return cls(Path(path))

    @cached_property
    def digest(self) -> str:
        """Hex sha256 that two folders share only when the same is served from them: over what
        config.json means, name and place of every tensor that is read, and samples of the data."""
        meaning = json.dumps(asdict(self.spec), sort_keys=True, default=str)
        names = self._served_names(self.spec.layers)
        scales = [scale for name in names if (scale := self._scale_name(name))]
        return self._tensors.digest(meaning, [*names, *scales])

    @property
    def bytes_read(self) -> int:
        """Bytes of weights read so far by `read_expert` and `read_gate`."""
        return self._tensors.bytes_read

    def slot_bytes(self, slot: Slot) -> int:
        """Bytes of a slot's weights on disk, FP8 scales included."""
        layer = self._layer(slot.layer)
        names = self._family.weight_names(layer, slot)
        stored = [part for name in names for part in (name, self._scale_name(name)) if part]
        return sum(self._tensors.info(name).num_bytes for name in stored)

    def read_expert(
        self, slot: Slot, dtype: torch.dtype | None = None, pause: Pause = no_pause
    ) -> ExpertWeights:
        """One slot's weights, dequantised, in `dtype` (None: the checkpoint's own).

        `pause` is called between pieces of the work. Raises CheckpointError when a weight is NaN or
        infinite, also when it became so in `dtype`.
        """
        names = self._family.weight_names(self._layer(slot.layer), slot)
        return ExpertWeights(*(self._read(name, dtype or self.spec.dtype, pause) for name in names))

    def is_fp8(self, slot: Slot) -> bool:
        """Whether a slot's weights are FP8 as `read_fp8_expert` gives them."""
        names = self._family.weight_names(self._layer(slot.layer), slot)
        return self._block == fp8.KERNEL_BLOCK and all(self._scale_name(name) for name in names)

    def read_fp8_expert(
        self, slot: Slot, dtype: torch.dtype | None = None, pause: Pause = no_pause
    ) -> Fp8ExpertWeights:
        """One slot's weights and scales as they are stored, for a model that runs in `dtype`.

        `pause` is called between pieces of the work. Raises CheckpointError where `is_fp8` is
        false, and as `read_expert`.
        """
        if not self.is_fp8(slot):
            raise CheckpointError(f"{self.path}: {slot} is not FP8 in blocks of 128 x 128")
        names = self._family.weight_names(self._layer(slot.layer), slot)
        matrices, scales = zip(*(self._read_fp8(name, dtype, pause) for name in names), strict=True)
        return Fp8ExpertWeights(*matrices, *scales)

    def sample(self, slot: Slot, matrix: int, count: int) -> tuple[int, torch.Tensor]:
        """Up to `count` weights from the middle of a slot's gate (0), up (1) or down (2) matrix.

        Returns where they start, in row-major order, and their values: in the dtype of the file,
        FP8 in float32.
        """
        name = self._family.weight_names(self._layer(slot.layer), slot)[matrix]
        rows, columns = self._tensors.info(name).shape
        count = min(count, rows * columns)
        first = (rows * columns - count) // 2
        values = self._tensors.read_span(name, first, count)
        scale_name = self._scale_name(name)
        if scale_name and self._block:
            scales = self._tensors.read(scale_name).float()
            place = torch.arange(first, first + count, device="cpu")
            row, column = place // columns // self._block.rows, place % columns
            values = values.float() * scales[row, column // self._block.columns]
        return first, values

    def read_gate(self, layer: int, dtype: torch.dtype | None = None) -> GateWeights:
        """What a router needs of one MoE layer, for a model that runs in `dtype` (None: the
        checkpoint's own). The matrix is float32 where the family computes float32 logits."""
        spec = self._layer(layer)
        if spec.gate is None:
            raise CheckpointError(f"{self.path}: layer {layer} is dense: it has no gate")
        run_dtype = dtype or self.spec.dtype
        weight = self._read(self._family.gate_name(layer), run_dtype)
        bias = self._family.bias_name(layer)
        shared_gate = self._family.shared_gate_name(spec)
        return GateWeights(
            weight=weight.float() if spec.gate.logits_float32 else weight,
            bias=self._read(bias, torch.float32)
            if bias
            else torch.zeros(spec.num_experts, dtype=torch.float32, device="cpu"),
            shared_gate=self._read(shared_gate, run_dtype) if shared_gate else None,
        )

    def close(self) -> None:
        """Closes the files. May be called again."""
        self._tensors.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _layer(self, index: int) -> LayerSpec:
        layer = self.spec.layer(index)
        if layer is None:
            raise CheckpointError(f"{self.path}: has no layer {index}")
        return layer

    def _served_names(self, layers: tuple[LayerSpec, ...]) -> list[str]:
        """Every tensor that servers and routers read, without scales."""
        names = [
            name
            for layer in layers
            for slot in layer.slots()
            for name in self._family.weight_names(layer, slot)
        ]
        for layer in layers:
            if layer.gate is not None:
                gate = self._family.gate_name(layer.index)
                bias = self._family.bias_name(layer.index)
                shared_gate = self._family.shared_gate_name(layer)
                names += [name for name in (gate, bias, shared_gate) if name]
        return names

    def _read_block(self, layers: tuple[LayerSpec, ...]) -> fp8.Block | None:
        """The FP8 block of what is served. Another scheme is none of our business where it was
        applied to other tensors only; one that was applied to nothing at all is refused."""
        names = self._served_names(layers)
        is_plain = all(
            name in self._tensors and self._tensors.info(name).dtype in _RUN_DTYPES.values()
            for name in names
        )
        modules = {name.rpartition(".")[0] for name in names if name.endswith(".weight")}
        served = set(names)
        scaled = any(
            name.rpartition(".")[0] in modules and name not in served for name in self._tensors
        )
        elsewhere = self._tensors.dtypes() - set(_RUN_DTYPES.values())
        if is_plain and not scaled and elsewhere:
            return None
        return fp8.read_block(self._config)

    def _scale_name(self, name: str) -> str | None:
        quantized = self._tensors.info(name).dtype == torch.float8_e4m3fn
        return name + fp8.SCALE_SUFFIX if quantized else None

    def _read(self, name: str, dtype: torch.dtype, pause: Pause = no_pause) -> torch.Tensor:
        tensor = self._tensors.read(name, pause)
        scale_name = self._scale_name(name)
        if scale_name and self._block:
            tensor = fp8.dequantize(tensor, self._tensors.read(scale_name), self._block, dtype)
            pause()
        tensor = tensor.to(dtype)
        if not _is_finite(tensor, pause):
            path = self._tensors.path_of(name)
            raise CheckpointError(f"{path}: {name} holds NaN or infinity (as {dtype})")
        return tensor

    def _read_fp8(
        self, name: str, dtype: torch.dtype | None, pause: Pause
    ) -> tuple[torch.Tensor, torch.Tensor]:
        dtype = dtype or self.spec.dtype
        weight = self._tensors.read(name, pause)
        scale = self._tensors.read(name + fp8.SCALE_SUFFIX).float()
        if not fp8.is_finite(weight, scale, fp8.KERNEL_BLOCK, dtype):
            path = self._tensors.path_of(name)
            raise CheckpointError(f"{path}: {name} holds NaN or infinity (as {dtype})")
        return weight, scale

    def _run_dtype(self, config: Config, layer: LayerSpec) -> torch.dtype:
        named = str(config.get("dtype")).removeprefix("torch.")
        if named in _RUN_DTYPES:
            return _RUN_DTYPES[named]
        first = self._family.weight_names(layer, next(layer.slots()))[0]
        stored = self._tensors.info(first).dtype
        return stored if stored in _RUN_DTYPES.values() else torch.bfloat16

    def _check_layer(self, layer: LayerSpec) -> None:
        hidden = self.spec.hidden_size
        for slot in layer.slots():
            gate, up, down = self._family.weight_names(layer, slot)
            width = layer.width(slot.expert)
            self._check_tensor(gate, (width, hidden))
            self._check_tensor(up, (width, hidden))
            self._check_tensor(down, (hidden, width))
        if layer.gate is not None:
            self._check_tensor(self._family.gate_name(layer.index), (layer.num_experts, hidden))
            if bias := self._family.bias_name(layer.index):
                self._check_tensor(bias, (layer.num_experts,))
            if shared_gate := self._family.shared_gate_name(layer):
                self._check_tensor(shared_gate, (1, hidden))

    def _check_tensor(self, name: str, shape: tuple[int, ...]) -> None:
        if name not in self._tensors:
            reason = explain(name, self._tensors, self._config)
            raise CheckpointError(f"{self._tensors.listing}: {name} is missing{reason}")
        info = self._tensors.info(name)
        path = self._tensors.path_of(name)
        if info.shape != shape:
            raise CheckpointError(
                f"{path}: {name} has shape {list(info.shape)}, expected {list(shape)}"
            )
        if scale_name := self._scale_name(name):
            if self._block is None or len(shape) != 2:
                raise CheckpointError(
                    f"{path}: {name} is float8, but config.json has no FP8 quantization_config"
                )
            self._check_tensor(scale_name, self._block.grid((shape[0], shape[1])))
        elif info.dtype not in _RUN_DTYPES.values():
            raise CheckpointError(f"{path}: {name} is {info.dtype}: not a dtype of weights")


def _is_finite(tensor: torch.Tensor, pause: Pause) -> bool:
    flat = tensor.view(-1)
    for piece in flat.split(max(1, PIECE_BYTES // tensor.element_size())):
        # aminmax hands NaN on: one pass over the weights, nothing allocated
        if not all(edge.isfinite() for edge in torch.aminmax(piece)):
            return False
        pause()
    return True


def slot_digest(weights: ExpertWeights | Fp8ExpertWeights, pause: Pause = no_pause) -> str:
    """Hex sha256 over one slot's loaded weights: dtype, shapes and every byte.

    `pause` is called between pieces of the work.
    """
    sha = hashlib.sha256()
    for tensor in weights:
        sha.update(f"{tensor.dtype} {list(tensor.shape)}\n".encode())
        whole = tensor.detach().cpu().contiguous()  # named: it must outlive its memory's hashing
        for piece in pieces(whole):
            sha.update(piece)
            pause()
    return sha.hexdigest()


def _read_config(path: Path) -> Config:
    """config.json with its family's defaults; refuses what no family here computes."""
    config = Config(path / "config.json", read_json(path / "config.json"))
    family = FAMILIES.get(str(config.get("model_type")))
    if family is None:
        raise CheckpointError(
            f"{config.path}: model_type {config.get('model_type')!r} is not served; "
            f"served: {', '.join(sorted(FAMILIES))}"
        )
    config = Config(config.path, config.values, family.defaults)
    config.expect(family.expects)
    return config


def _read_layers(config: Config, family: Family) -> Iterator[LayerSpec]:
    for index in range(config.size("num_hidden_layers")):
        layer = family.layer_spec(config, index)
        if layer.gate is not None:
            try:
                check_gate(layer.gate, layer.num_experts)
            except ConfigError as error:
                raise CheckpointError(f"{config.path}: layer {index}: {error}") from error
        yield layer
