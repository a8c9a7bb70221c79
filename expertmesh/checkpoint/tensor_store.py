"""Every tensor of a checkpoint folder, in whichever of its files it lies.

A file is opened when a tensor in it is asked for, so that one which nobody reads need not be there.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from expertmesh.checkpoint.safetensors_file import (
    Pause,
    SafetensorsFile,
    TensorInfo,
    because,
    no_pause,
)
from expertmesh.errors import CheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_SAMPLED_TENSORS = 1024  # at most, for the digest: one small read each
_SAMPLE_BYTES = 64


class TensorStore:
    """The files of one checkpoint. Reading is thread-safe.

    A folder with both a single file and an index is read as transformers reads it: the single file.
    Raises CheckpointError, naming the file and the tensor, when something is missing or garbled.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, SafetensorsFile] = {}
        self._lock = threading.Lock()
        self._bytes_read = 0
        if (folder / SINGLE_FILE).exists() or not os.path.lexists(folder / INDEX_FILE):
            self.listing = folder / SINGLE_FILE
            _check_is_there(self.listing)
            file = self._files[SINGLE_FILE] = SafetensorsFile(self.listing)
            self._file_of = dict.fromkeys([*file.tensors, *file.unreadable], SINGLE_FILE)
        else:
            self.listing = folder / INDEX_FILE
            self._file_of = _read_index(self.listing)

    @property
    def bytes_read(self) -> int:
        """Bytes of all tensors read so far."""
        return self._bytes_read

    def close(self) -> None:
        """Closes every file. May be called again."""
        for file in self._files.values():
            file.close()

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def __iter__(self) -> Iterator[str]:
        """The name of every tensor that the folder lists, read or not."""
        return iter(self._file_of)

    def dtypes(self) -> set[torch.dtype | str]:
        """How tensors are stored in the files opened so far; by name where torch has none."""
        files = list(self._files.values())
        known = {info.dtype for file in files for info in file.tensors.values()}
        return known.union(*(file.unreadable.values() for file in files))

    def path_of(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self._find(name).path

    def info(self, name: str) -> TensorInfo:
        """Dtype, shape and place of a tensor."""
        return self._find(name).tensors[name]

    def read(self, name: str, pause: Pause = no_pause) -> torch.Tensor:
        """One whole tensor, in its stored dtype."""
        file = self._find(name)
        tensor = file.read(name, pause)
        with self._lock:
            self._bytes_read += file.tensors[name].num_bytes
        return tensor

    def read_span(self, name: str, first: int, count: int) -> torch.Tensor:
        """`count` elements of a tensor from the `first` on, in its stored dtype."""
        return self._find(name).read_span(name, first, count)

    def digest(self, header: str, names: Sequence[str]) -> str:
        """Hex sha256 over `header`, the named tensors' dtypes, shapes and places, and samples of
        their data: cheap, the same on every machine, different for retrained weights."""
        names = sorted(names)
        sha = hashlib.sha256(header.encode())
        for name in names:
            info = self.info(name)
            entry = [name, self._file_of[name], str(info.dtype), info.shape, info.start]
            sha.update(json.dumps(entry).encode() + b"\n")
        count = min(len(names), _SAMPLED_TENSORS)
        for position in range(count):
            name = names[position * len(names) // count]
            sha.update(self._find(name).sample(name, _SAMPLE_BYTES))
        return sha.hexdigest()

    def _find(self, name: str) -> SafetensorsFile:
        file_name = self._file_of.get(name)
        if file_name is None:
            raise CheckpointError(f"{self.listing}: {name} is missing")
        file = self._open(file_name)
        if name in file.unreadable:
            raise CheckpointError(f"{file.path}: {name}: unknown dtype {file.unreadable[name]!r}")
        if name not in file.tensors:
            raise CheckpointError(f"{file.path}: {name} is missing, but the index puts it here")
        return file

    def _open(self, file_name: str) -> SafetensorsFile:
        file = self._files.get(file_name)
        if file is None:
            with self._lock:
                file = self._files.get(file_name)
                if file is None:
                    file = self._files[file_name] = SafetensorsFile(self.path_to(file_name))
        return file

    def path_to(self, file_name: str) -> Path:
        """Where a file of the checkpoint is."""
        return self._folder / file_name


def _check_is_there(single: Path) -> None:
    """Raises CheckpointError saying what the folder has instead of weights that can be read."""
    if os.path.lexists(single):
        return
    endings = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
    found = sorted(each.name for each in single.parent.glob("*") if each.name.endswith(endings))
    instead = f"; it holds {', '.join(found[:5])}, which is another format" if found else ""
    raise CheckpointError(f"{single.parent}: holds neither {SINGLE_FILE} nor {INDEX_FILE}{instead}")


def _read_index(path: Path) -> dict[str, str]:
    """Tensor name → file name. Only plain names: an index must not reach outside its folder."""
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: has no weight_map")
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not name or Path(name).name != name:
            raise CheckpointError(f"{path}: {tensor}: {name!r} is not a file name")
    return weight_map


def read_json(path: Path) -> Mapping[str, object]:
    """A JSON object from a file. Raises CheckpointError naming the file."""
    try:
        values = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {because(error, path)}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: is not a JSON object")
    return values
