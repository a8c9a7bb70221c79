"""The rules of buf's STANDARD and COMMENTS categories, over the compiled descriptors."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
    ServiceDescriptorProto,
)
from google.protobuf.message import Message

PASCAL = re.compile(r"([A-Z][a-z0-9]*)+")
LOWER_SNAKE = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")
UPPER_SNAKE = re.compile(r"[A-Z][A-Z0-9]*(_[A-Z0-9]+)*")

# What each kind of descriptor is made of, and in which of its fields.
PARTS: dict[type[Message], dict[str, str]] = {
    FileDescriptorProto: {"message": "message_type", "enum": "enum_type", "service": "service"},
    DescriptorProto: {
        "message": "nested_type",
        "enum": "enum_type",
        "field": "field",
        "oneof": "oneof_decl",
    },
    EnumDescriptorProto: {"value": "value"},
    ServiceDescriptorProto: {"rpc": "method"},
}


class Element(NamedTuple):
    """A message, field, oneof, enum, value, service or rpc."""

    kind: str
    name: str  # with its file and parents
    proto: Any  # its descriptor
    comment: str

    def __str__(self) -> str:
        return f"{self.kind} {self.name}"


def elements(file: FileDescriptorProto, kind: str) -> list[Element]:
    """Every element of one kind, nested ones included."""
    comments = {
        tuple(location.path): location.leading_comments + location.trailing_comments
        for location in file.source_code_info.location
    }

    def walk(parent: Any, path: tuple[int, ...], name: str) -> Iterator[Element]:
        for part, field in PARTS.get(type(parent), {}).items():
            number = parent.DESCRIPTOR.fields_by_name[field].number
            for index, proto in enumerate(getattr(parent, field)):
                here, full_name = (*path, number, index), f"{name}.{proto.name}"
                yield Element(part, full_name, proto, comments.get(here, ""))
                yield from walk(proto, here, full_name)

    return [element for element in walk(file, (), file.name) if element.kind == kind]


@pytest.fixture(scope="module")
def files(
    tmp_path_factory: pytest.TempPathFactory, protoc: Callable[..., None]
) -> list[FileDescriptorProto]:
    path = tmp_path_factory.mktemp("descriptors") / "set"
    protoc("--include_source_info", f"--descriptor_set_out={path}")
    return list(FileDescriptorSet.FromString(path.read_bytes()).file)


def test_the_contract_has_the_four_files_of_the_design(files: list[FileDescriptorProto]) -> None:
    names = {Path(file.name).name for file in files}

    assert names == {"control.proto", "expert.proto", "router.proto", "tensor.proto"}


def test_files_are_proto3_in_the_package_of_their_directory(
    files: list[FileDescriptorProto],
) -> None:
    found = {(file.syntax, file.package, Path(file.name).parent.as_posix()) for file in files}

    assert found == {("proto3", "expertmesh.v1", "expertmesh/v1")}


def test_every_import_is_used_and_none_is_public_or_weak(
    files: list[FileDescriptorProto],
) -> None:
    home = {
        f".{file.package}.{part.name}": file.name
        for file in files
        for part in (*file.message_type, *file.enum_type)
    }

    for file in files:
        fields = [element.proto.type_name for element in elements(file, "field")]
        used = {home[name] for name in fields if name} - {file.name}
        assert set(file.dependency) == used, file.name
        assert not file.public_dependency, file.name
        assert not file.weak_dependency, file.name


@pytest.mark.parametrize("kind", ["message", "field", "oneof", "enum", "value", "service", "rpc"])
def test_everything_is_commented(files: list[FileDescriptorProto], kind: str) -> None:
    found = [element for file in files for element in elements(file, kind)]

    assert found
    assert [str(element) for element in found if not element.comment.strip()] == []


@pytest.mark.parametrize(
    ("kind", "pattern"),
    [
        ("message", PASCAL),
        ("enum", PASCAL),
        ("service", PASCAL),
        ("rpc", PASCAL),
        ("field", LOWER_SNAKE),
        ("oneof", LOWER_SNAKE),
        ("value", UPPER_SNAKE),
    ],
)
def test_names_have_the_case_of_their_kind(
    files: list[FileDescriptorProto], kind: str, pattern: re.Pattern[str]
) -> None:
    found = [element for file in files for element in elements(file, kind)]

    assert [str(e) for e in found if not pattern.fullmatch(e.proto.name)] == []


def test_enum_values_are_prefixed_and_zero_is_unspecified(
    files: list[FileDescriptorProto],
) -> None:
    enums = [element.proto for file in files for element in elements(file, "enum")]

    for enum in enums:
        prefix = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", enum.name).upper() + "_"
        assert [v.name for v in enum.value if not v.name.startswith(prefix)] == []
        assert [v.name for v in enum.value if v.number == 0] == [prefix + "UNSPECIFIED"]
        assert enum.value[0].number == 0


def test_service_names_end_in_service(files: list[FileDescriptorProto]) -> None:
    services = [element.proto.name for file in files for element in elements(file, "service")]

    assert [name for name in services if not name.endswith("Service")] == []


def test_every_rpc_has_a_request_and_a_response_of_its_own(
    files: list[FileDescriptorProto],
) -> None:
    rpcs = [element.proto for file in files for element in elements(file, "rpc")]

    for rpc in rpcs:
        assert rpc.input_type == f".expertmesh.v1.{rpc.name}Request"
        assert rpc.output_type == f".expertmesh.v1.{rpc.name}Response"
    assert len({rpc.name for rpc in rpcs}) == len(rpcs)


def test_lines_are_at_most_80_columns_without_tabs(root: Path) -> None:
    lines = [
        f"{path.name}:{number}"
        for path in (root / "protos/expertmesh/v1").iterdir()
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if len(line) > 80 or "\t" in line
    ]

    assert lines == []
