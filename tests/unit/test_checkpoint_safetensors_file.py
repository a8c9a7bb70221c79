"""The safetensors reader: agrees with the format's own writer, refuses what is not whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from expertmesh.checkpoint.safetensors_file import SafetensorsFile, memory, pieces
from expertmesh.errors import CheckpointError

GOOD = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}


def write(path: Path, header: object, data: bytes = b"", *, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(text) if length is None else length
    path.write_bytes(size.to_bytes(8, "little") + text + data)
    return path


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.float64,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
        torch.int64,
        torch.int32,
        torch.uint8,
        torch.bool,
    ],
    ids=str,
)
def test_every_dtype_reads_back_as_it_was_written(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {
        "matrix": torch.arange(6).reshape(2, 3).to(dtype),
        "scalar": torch.tensor(1).to(dtype),
        "empty": torch.empty(0, 4, dtype=dtype),
    }
    save_file(tensors, tmp_path / "x", metadata={"format": "pt"})

    file = SafetensorsFile(tmp_path / "x")
    found = {name: file.read(name) for name in tensors}
    file.close()

    for name, tensor in tensors.items():
        assert found[name].dtype == dtype
        assert found[name].shape == tensor.shape
        assert bytes(memory(found[name])) == bytes(memory(tensor))


def test_a_sample_is_the_middle_of_a_tensor(tmp_path: Path) -> None:
    save_file({"a": torch.arange(100, dtype=torch.uint8)}, tmp_path / "x")

    file = SafetensorsFile(tmp_path / "x")

    assert file.sample("a", 4) == bytes([48, 49, 50, 51])
    assert file.sample("a", 500) == bytes(range(100))
    file.close()


@pytest.mark.parametrize(
    ("header", "data", "says"),
    [
        (b"\x00\xff garbage", b"", "not JSON"),
        (b"[" * 100_000, b"", "not JSON"),
        ([1], b"", "not a JSON object"),
        ({"a": 1}, b"", "a: its header entry"),
        ({"a": {**GOOD["a"], "dtype": "F7"}}, bytes(7), "a: ends at byte .* truncated"),
        ({"a": {**GOOD["a"], "dtype": "F7", "data_offsets": [8, 0]}}, bytes(8), "a: data_offsets"),
        ({"a": {**GOOD["a"], "dtype": "F7", "data_offsets": []}}, b"", "a: data_offsets"),
        ({"a": {**GOOD["a"], "shape": [3]}}, bytes(8), "a: data_offsets"),
        ({"a": {**GOOD["a"], "shape": [-2]}}, bytes(8), "a: shape"),
        ({"a": {**GOOD["a"], "shape": "2"}}, bytes(8), "a: shape"),
        ({"a": {**GOOD["a"], "data_offsets": [8, 0]}}, bytes(8), "a: data_offsets"),
        ({"a": {"dtype": "F32"}}, bytes(8), "a: shape is None"),
        ({"a": {**GOOD["a"], "data_offsets": [4, 12]}}, bytes(12), "a: starts at byte"),
        ({**GOOD, "b": GOOD["a"]}, bytes(8), "b: starts at byte"),
        (GOOD, bytes(7), "a: ends at byte .* truncated"),
        (GOOD, bytes(9), "1 bytes follow the last tensor"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_garbled_file_is_refused_by_name(
    header: object, data: bytes, says: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "bad.safetensors", header, data)

    with pytest.raises(CheckpointError, match=rf"bad\.safetensors: .*{says}"):
        SafetensorsFile(path)


def test_a_tensor_of_an_unknown_dtype_is_no_obstacle_to_the_others(tmp_path: Path) -> None:
    four_bits = {"dtype": "F4", "shape": [3, 4], "data_offsets": [0, 6]}
    known = {"dtype": "U8", "shape": [2], "data_offsets": [6, 8]}
    path = write(tmp_path / "x", {"a": four_bits, "b": known}, bytes(range(8)))

    file = SafetensorsFile(path)

    assert file.read("b").tolist() == [6, 7]
    assert file.unreadable == {"a": "F4"}
    assert "a" not in file.tensors
    file.close()


@pytest.mark.parametrize("content", [b"", b"1234", (1 << 40).to_bytes(8, "little") + b"{}"])
def test_a_file_shorter_than_its_header_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "short").write_bytes(content)

    with pytest.raises(CheckpointError, match=r"short: "):
        SafetensorsFile(tmp_path / "short")


def test_a_file_truncated_after_opening_is_an_error_that_names_the_tensor(tmp_path: Path) -> None:
    path = write(tmp_path / "x", GOOD, bytes(8))
    file = SafetensorsFile(path)
    path.write_bytes(path.read_bytes()[:-3])

    with pytest.raises(CheckpointError, match="x: a: the file ends at byte"):
        file.read("a")
    file.close()


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere: cannot be opened"):
        SafetensorsFile(tmp_path / "nowhere")


def test_memory_of_a_strided_tensor_is_refused() -> None:
    with pytest.raises(ValueError, match="contiguous"):
        memory(torch.zeros(3, 4).t())


def test_a_large_tensor_is_read_in_pieces_with_a_pause_after_each(tmp_path: Path) -> None:
    large = torch.randint(0, 256, (5, 1 << 19), dtype=torch.uint8)  # 2.5 MiB
    save_file({"large": large}, tmp_path / "x.safetensors")
    pauses: list[int] = []
    file = SafetensorsFile(tmp_path / "x.safetensors")

    found = file.read("large", lambda: pauses.append(1))

    file.close()
    assert torch.equal(found, large)
    assert len(pauses) == 3
    assert b"".join(pieces(found)) == large.numpy().tobytes()
