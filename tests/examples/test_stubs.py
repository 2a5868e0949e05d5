"""The Go stubs are those of the protos: seen without Go by the descriptors inside, and with Go by making them again."""

from __future__ import annotations

import filecmp
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from google.protobuf.descriptor import FileDescriptor
from google.protobuf.descriptor_pb2 import DescriptorProto, FieldDescriptorProto, FileDescriptorProto
from pagewire.v1 import admin_pb2, inference_pb2

from examples.toolchains import GO

ROOT = Path(__file__).parents[2]
STUBS = ROOT / "examples/go/gen/pagewire/v1"
ESCAPES = {"n": b"\n", "t": b"\t", "r": b"\r", "a": b"\a", "b": b"\b", "f": b"\f", "v": b"\v", '"': b'"', "\\": b"\\"}


def _bytes(literals: str) -> bytes:
    """Of Go's string literals, joined by `+`."""
    found = b""
    for literal in re.findall(r'"((?:[^"\\]|\\.)*)"', literals):
        for plain, code, letter in re.findall(r"([^\\]+)|\\x([0-9a-f]{2})|\\(.)", literal):
            found += plain.encode() or bytes.fromhex(code) or ESCAPES[letter]
    return found


@pytest.mark.parametrize("file", [admin_pb2.DESCRIPTOR, inference_pb2.DESCRIPTOR], ids=["admin", "inference"])
def test_the_go_stubs_describe_the_committed_protos(file: FileDescriptor) -> None:
    source = (STUBS / Path(file.name).with_suffix(".pb.go").name).read_text()
    described = re.search(r"_rawDesc = (.*?)\n\n", source, re.DOTALL)
    assert described is not None
    in_go, ours = FileDescriptorProto.FromString(_bytes(described[1])), FileDescriptorProto()
    file.CopyToProto(ours)
    for message in (field for top in (*in_go.message_type, *ours.message_type) for field in _fields(top)):
        message.ClearField("json_name")  # protoc adds it for some plugins
    assert in_go == ours, "run make go-stubs"


def _fields(message: DescriptorProto) -> Iterator[FieldDescriptorProto]:
    yield from message.field
    for nested in message.nested_type:
        yield from _fields(nested)


@pytest.mark.timeout(300)  # the first time, Go brings and compiles its generators
def test_the_go_stubs_are_those_that_go_makes(tmp_path: Path) -> None:
    if why := GO.missing():
        pytest.skip(why)
    tools = Path(sys.executable).parent
    make = ["make", "--silent", "--old-file=.venv/dev", "go-stubs", f"BIN={tools}", f"GO_OUT={tmp_path}"]
    subprocess.run(make, cwd=ROOT, timeout=300, check=True)
    made = tmp_path / "gen/pagewire/v1"
    names = {path.name for path in STUBS.iterdir()}
    assert names == {path.name for path in made.iterdir()}
    _, different, missing = filecmp.cmpfiles(STUBS, made, sorted(names), shallow=False)
    assert not different + missing, "run make go-stubs"
