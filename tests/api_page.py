"""`python -m tests.api_page` prints docs/api.md: the public API, from inference.proto and its comments."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
)
from grpc_tools import protoc  # type: ignore[import-untyped]

from tests.checkpoints import ROOT

PROTO = "splitfire/v1/inference.proto"
MESSAGES, ENUMS, SERVICES, FIELDS, VALUES, METHODS, NESTED_ENUMS = 4, 5, 6, 2, 2, 2, 4  # numbers of descriptor.proto's own fields
PLACE = tuple[int, ...]
Field = FieldDescriptorProto
HEAD = f"""# The public API

From [inference.proto](../proto/{PROTO}), by `make docs`; a stock gRPC client needs that file and nothing else.
Services are `splitfire.v1.Inference` and `splitfire.v1.Admin`, errors are `google.rpc.Status` with a stable `reason`
([errors.py](../splitfire/core/errors.py)). A field with *optional* can be told from one that is not set.
[openai.md](openai.md) has the same over HTTP.
"""


def read() -> FileDescriptorProto:
    """With comments, which the generated code does not have."""
    with tempfile.NamedTemporaryFile() as file:
        arguments = ["protoc", f"-I{ROOT / 'proto'}", "--include_source_info", f"--descriptor_set_out={file.name}", PROTO]
        assert protoc.main(arguments) == 0
        return FileDescriptorSet.FromString(Path(file.name).read_bytes()).file[0]


def comments(file: FileDescriptorProto) -> Mapping[PLACE, str]:
    """By place: what stands before a thing, then what stands behind it."""
    found = {}
    for location in file.source_code_info.location:
        parts = (location.leading_comments, location.trailing_comments)
        found[tuple(location.path)] = " ".join(" ".join(part.split()) for part in parts if part.strip())
    return found


def type_name(field: FieldDescriptorProto, maps: Mapping[str, DescriptorProto]) -> str:
    name = field.type_name.rpartition(".")[2]
    if name in maps:
        key, value = maps[name].field
        return f"map<{type_name(key, maps)}, {type_name(value, maps)}>"
    known = link(name) if name else Field.Type.Name(field.type).removeprefix("TYPE_").lower()
    if field.label == Field.LABEL_REPEATED:
        return f"repeated {known}"
    return f"optional {known}" if field.proto3_optional else known


def of_message(message: DescriptorProto, place: PLACE, said: Mapping[PLACE, str]) -> Iterator[str]:
    maps = {nested.name: nested for nested in message.nested_type if nested.options.map_entry}
    yield f"### {message.name}\n"
    if said.get(place):
        yield f"{said[place]}\n"
    if message.field:
        yield "| field | type | |\n|---|---|---|"
        for i, field in enumerate(message.field):
            yield f"| `{field.name}` | {type_name(field, maps)} | {cell(said.get((*place, FIELDS, i), ''))} |"
        yield ""
    for i, enum in enumerate(message.enum_type):
        yield from of_enum(enum, (*place, NESTED_ENUMS, i), said)


def of_enum(enum: EnumDescriptorProto, place: PLACE, said: Mapping[PLACE, str]) -> Iterator[str]:
    yield f"### {enum.name}\n"
    if said.get(place):
        yield f"{said[place]}\n"
    yield "| value | |\n|---|---|"
    for i, value in enumerate(enum.value):
        yield f"| `{value.name}` = {value.number} | {cell(said.get((*place, VALUES, i), ''))} |"
    yield ""


def link(name: str) -> str:
    return f"[{name}](#{name.lower()})"


def cell(text: str) -> str:
    return text.replace("|", "\\|")


def page() -> str:
    file = read()
    said = comments(file)
    lines = [HEAD]
    for i, service in enumerate(file.service):
        lines.append(f"## {service.name}\n")
        if said.get((SERVICES, i)):
            lines.append(said[SERVICES, i] + "\n")
        lines.append("| call | takes | gives | |\n|---|---|---|---|")
        for j, method in enumerate(service.method):
            takes, gives = (name.rpartition(".")[2] for name in (method.input_type, method.output_type))
            stream = "stream of " if method.server_streaming else ""
            about = cell(said.get((SERVICES, i, METHODS, j), ""))
            lines.append(f"| `{method.name}` | {link(takes)} | {stream}{link(gives)} | {about} |")
        lines.append("")
    lines.append("## Messages\n")
    for i, message in enumerate(file.message_type):
        lines += of_message(message, (MESSAGES, i), said)
    for i, enum in enumerate(file.enum_type):
        lines += of_enum(enum, (ENUMS, i), said)
    return "\n".join(lines)


if __name__ == "__main__":
    print(page())  # noqa: T201
