"""A client in another language works from the .proto alone: Node's grpc-js calls a real router."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from tests.checkpoints import make_checkpoint
from tests.mesh import local_mesh

_HERE = Path(__file__).parent
_INSTALL_S = 120.0
_CALL_S = 90.0
_CHUNK_BYTES = 1 << 20
_MOE_LAYER = 1  # layer 0 of the small model is dense
_DISTINCT_ROWS = 61  # repeated to fill more than a chunk; prime, so a row out of place shows


class Answers(NamedTuple):
    """What the Node client printed and wrote, and what the model in process says."""

    printed: dict[str, Any]
    forward: torch.Tensor
    stream_whole: torch.Tensor
    stream_single: torch.Tensor
    expected: torch.Tensor


@pytest.fixture(scope="module")
def node() -> str:
    """The node program, with the client's packages installed."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        pytest.skip("node and npm are not installed")
    installed = _HERE / "node_modules/.package-lock.json"
    wanted = _HERE / "package-lock.json"
    if not installed.exists() or installed.stat().st_mtime < wanted.stat().st_mtime:
        subprocess.run([npm, "ci", "--silent"], cwd=_HERE, check=True, timeout=_INSTALL_S)
    return node


@pytest.fixture(scope="module")
def answers(node: str, tmp_path_factory: pytest.TempPathFactory) -> Answers:
    folder = tmp_path_factory.mktemp("node")
    model = make_checkpoint("deepseek_v3", folder / "checkpoint")
    width = model.config.hidden_size
    distinct = torch.randn(_DISTINCT_ROWS, width, generator=torch.Generator().manual_seed(0))
    repeated = torch.arange(3 * _CHUNK_BYTES // 2 // (4 * width)) % _DISTINCT_ROWS
    (folder / "in").write_bytes(distinct[repeated].numpy().tobytes())
    with torch.no_grad():
        expected = model.model.layers[_MOE_LAYER].mlp(distinct[None])[0]

    with local_mesh(folder / "checkpoint") as mesh:
        done = subprocess.run(
            [node, _HERE / "client.mjs", mesh.address, str(_MOE_LAYER), folder / "in", folder],
            capture_output=True,
            text=True,
            timeout=_CALL_S,
            check=False,
        )

    assert done.returncode == 0, done.stderr
    written = (_read(folder / name, width) for name in ("forward", "stream_whole", "stream_single"))
    return Answers(json.loads(done.stdout), *written, expected[repeated])


def _read(path: Path, width: int) -> torch.Tensor:
    return torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.float32).view(-1, width)


def _assert_equal(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.shape == expected.shape
    assert (found - expected).norm() <= 1e-5 * expected.norm()


def test_describe_names_the_layers_of_the_model(answers: Answers) -> None:
    described = answers.printed["described"]
    kinds = {layer["index"]: layer["kind"] for layer in described["layers"]}

    assert described["protocol_version"] == 1
    assert described["hidden_size"] == answers.expected.shape[1]
    assert kinds[0] == "LAYER_KIND_DENSE"
    assert kinds[_MOE_LAYER] == "LAYER_KIND_MOE"


def test_a_unary_forward_gives_the_layers_output(answers: Answers) -> None:
    _assert_equal(answers.forward, answers.expected)


def test_a_stream_keeps_two_frames_apart_and_their_chunks_in_order(answers: Answers) -> None:
    _assert_equal(answers.stream_whole, answers.expected)
    _assert_equal(answers.stream_single, answers.expected[:1])
    assert answers.printed["stream"]["whole"]["messages"] == 2
    assert answers.printed["stream"]["single"]["messages"] == 1


def test_an_unknown_layer_is_refused_by_status_and_by_frame(answers: Answers) -> None:
    not_found = 5
    refused = answers.printed["refused"]

    assert refused["unary"]["code"] == not_found
    assert "1000000" in refused["unary"]["details"]
    assert refused["frame"]["code"] == not_found
    assert refused["frame"]["reason"] == "UNKNOWN_LAYER"
    assert refused["frame"]["message"] == refused["unary"]["details"]
