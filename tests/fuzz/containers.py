"""Mutators inside containers: lengths, checksums and directories stay right, so that the damage reaches the reader."""

from __future__ import annotations

import io
import json
import struct
import zipfile
import zlib
from random import Random

import onnx

from .mutators import BYTES, Mutator
from .trees import change_tree

EXTREMES = (0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1)


# --- safetensors ------------------------------------------------------------------------------------------------------


def change_header(data: bytes, rng: Random) -> bytes:
    """Other names, types, shapes or places of tensors, under the right length."""
    try:
        size = struct.unpack("<Q", data[:8])[0]
        header = json.loads(data[8 : 8 + size])
    except (struct.error, ValueError):
        return data
    fresh = json.dumps(change_tree(header, rng)).encode()
    return struct.pack("<Q", len(fresh)) + fresh + data[8 + size :]


def change_type(data: bytes, rng: Random) -> bytes:
    """Another type of the same width for one tensor."""
    swaps = ((b'"F32"', b'"I32"'), (b'"F32"', b'"U32"'), (b'"U8"', b'"I8"'), (b'"U8"', b'"BOOL"'), (b'"I32"', b'"F32"'))
    old, new = rng.choice(swaps)
    size = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + size].replace(old, new, rng.choice((1, 1000)))
    return struct.pack("<Q", len(header)) + header + data[8 + size :]


def change_values(data: bytes, rng: Random) -> bytes:
    """Values of tensors become NaN, infinite, huge, tiny or zero."""
    size = 8 + int.from_bytes(data[:8], "little")
    if size > len(data) - 4:
        return data
    value = struct.pack("<f", rng.choice((float("nan"), float("inf"), -float("inf"), 3e38, 1e-45, 0.0, -1.0)))
    start = rng.randrange(size, len(data) - 3)
    start -= (start - size) % 4
    return data[:start] + value * rng.choice((1, 1, 8)) + data[start + 4 :]


def declare_length(data: bytes, rng: Random) -> bytes:
    return struct.pack("<Q", rng.choice(EXTREMES)) + data[8:]


SAFETENSORS: tuple[Mutator, ...] = (
    change_header,
    change_header,
    change_type,
    change_values,
    change_values,
    declare_length,
)


# --- tar --------------------------------------------------------------------------------------------------------------

FIELDS = {  # offset and length
    "name": (0, 100), "mode": (100, 8), "uid": (108, 8), "size": (124, 12), "mtime": (136, 12), "type": (156, 1),
    "link": (157, 100), "magic": (257, 8), "prefix": (345, 155),
}  # fmt: skip


def change_tar(data: bytes, rng: Random) -> bytes:
    """One field of one header, under the right checksum."""
    headers = [i for i in range(0, len(data) - 511, 512) if data[i + 257 : i + 262] == b"ustar"]
    if not headers:
        return data
    at = rng.choice(headers)
    name = rng.choice(("size", "size", "type", "type", "name", *FIELDS))
    offset, length = FIELDS[name]
    if name == "type":
        value = bytes([rng.choice(b"0123456789xgLKSVMND\0z")])
    elif name == "size":
        large = b"\x80" + rng.choice(EXTREMES).to_bytes(11, "big")
        value = rng.choice(
            (b"77777777777\0", b"00000000000\0", large, b"\xff" * 12, b"-1         \0", b"9x9        \0")
        )
    else:
        value = rng.choice((
            b"", b"\xff" * length, b"../../x", b"/etc/passwd", b"a.png", b".hidden", b"x" * length, b"a.JPG", b"a.json",
            b"a\nb.png", b"a.cls",
        ))[:length].ljust(length, b"\0")  # fmt: skip
    block = bytearray(data[at : at + 512])
    block[offset : offset + length] = value
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return data[:at] + bytes(block) + data[at + 512 :]


TAR: tuple[Mutator, ...] = (change_tar, change_tar, change_tar)


# --- PNG --------------------------------------------------------------------------------------------------------------


def change_png(data: bytes, rng: Random) -> bytes:
    """The size in pixels, the kind of pixels, or another chunk, under the right checksum."""
    chunks, at = [], 8
    while at + 12 <= len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        chunks.append([data[at + 4 : at + 8], data[at + 8 : at + 8 + size]])
        at += 12 + size
    if not chunks or chunks[0][0] != b"IHDR" or len(chunks[0][1]) != 13:
        return data
    if rng.random() < 0.7:
        side = (1, 2, 30_000, 65_535, 2**31 - 1, 2**32 - 1, 0)
        width, height, *rest = struct.unpack(">IIBBBBB", chunks[0][1])
        width, height = rng.choice(((rng.choice(side), height), (width, rng.choice(side)), (1, 30_000), (9000, 9000)))
        if rng.random() < 0.3:
            rest[rng.randrange(5)] = rng.choice((0, 1, 2, 3, 4, 6, 8, 16, 255))
        chunks[0][1] = struct.pack(">IIBBBBB", width, height, *rest)
    else:
        chunk = rng.choice(chunks)
        chunk[1] = rng.choice(BYTES)(chunk[1], rng)
    if rng.random() < 0.2:
        text = rng.choice((b"iCCP", b"zTXt", b"iTXt", b"tEXt"))
        bomb = zlib.compress(bytes(30_000_000), 1)
        chunks.insert(1, [text, b"k\0\0" + bomb])
    return data[:8] + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )


PNG: tuple[Mutator, ...] = (change_png, change_png, change_png)


# --- zip, as torch.save and numpy.savez write it ----------------------------------------------------------------------


def change_zip(data: bytes, rng: Random) -> bytes:
    """One member damaged, missing, twice or under another name."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = [[name, archive.read(name)] for name in archive.namelist()]
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError, EOFError, zlib.error):
        return data
    if not members:
        return data
    i = rng.randrange(len(members))
    how = rng.choice(("bytes", "bytes", "bytes", "pickle", "drop", "double", "rename", "npy"))
    if how == "bytes":
        members[i][1] = rng.choice(BYTES)(members[i][1], rng)
    elif how == "pickle":
        members[i][1] = insert_opcode(members[i][1], rng)
    elif how == "npy":
        members[i][1] = _other_npy(members[i][1], rng)
    elif how == "drop":
        del members[i]
    elif how == "double":
        members.append([members[i][0] + "x", members[i][1]])
    else:
        members[i][0] = rng.choice(("x", "../x", "archive/data.pkl", "archive/version", "archive/byteorder"))
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return target.getvalue()


def _other_npy(data: bytes, rng: Random) -> bytes:
    """Another shape or type in the header of an array, of the same length."""
    new = rng.choice(("(10**9,)", "(1<<40,)", f"({2**62},)", "(-1,)", "(0,)", "((),)", "(1.5,)", "[3]"))
    start = data.find(b"'shape': ")
    if start < 0:
        return data
    start += 9
    end = data.index(b")", start) + 1
    padding = data[:128].rstrip(b"\n ")
    header = padding[:start] + new.encode() + padding[end:]
    return header.ljust(127) + b"\n" + data[128:]


ZIP: tuple[Mutator, ...] = (change_zip, change_zip, change_zip)


# --- pickle -----------------------------------------------------------------------------------------------------------

OPCODES = (
    b"r\xff\xff\xff\x3f",  # a place in the memo far behind its end
    b"p99999999\n", b"j\xff\xff\xff\x7f", b"h\x00", b"q\x00", b"\x8b\xff\xff\xff\x7f", b"\x8b\xff\xff\xff\xff",
    b"\x8a\xff", b"\x8e" + b"\xff" * 7 + b"\x7f", b"\x96" + b"\xff" * 3 + b"\x7f\0\0\0\0",
    b"\x8d" + b"\xff" * 7 + b"\x7f", b"B\xff\xff\xff\x7f", b"X\xff\xff\xff\x7f",
    b"(" * 5000, b"(" * 5000 + b"t" * 5000, b"]" * 5000, b")\x85" * 2000, b"cos\nsystem\n", b"c__builtin__\neval\n",
    b"R", b"b", b"\x81", b"0", b"1", b"2", b".", b"N", b"I9" + b"9" * 5000 + b"\n", b"L9" + b"9" * 4000 + b"L\n",
    b"F1e999\n", b"P1\n", b"Q", b"\x82\x01", b"\x80\x63", b"\x95" + b"\xff" * 8, b"u", b"s", b"a", b"e", b"d", b"l",
    b"}", b"K\x01",
)  # fmt: skip


def insert_opcode(data: bytes, rng: Random) -> bytes:
    """An instruction that claims or builds too much, or that a pickle of plain values has not."""
    start = rng.choice((2, rng.randrange(len(data) + 1), max(0, len(data) - 1)))
    return data[:start] + rng.choice(OPCODES) + data[start:]


PICKLE: tuple[Mutator, ...] = (insert_opcode, insert_opcode, insert_opcode)


# --- ONNX -------------------------------------------------------------------------------------------------------------


def change_onnx(data: bytes, rng: Random) -> bytes:
    """Another op, attribute, edge, size, type or version; the file stays a protobuf message."""
    model = onnx.ModelProto()
    try:
        model.ParseFromString(data)
    except Exception:
        return data
    nodes, tensors = list(model.graph.node), list(model.graph.initializer)
    how = rng.choice(("op", "attribute", "edge", "drop", "dims", "type", "bytes", "opset", "input", "notes", "cycle"))
    if how in ("op", "attribute", "edge", "drop", "cycle") and nodes:
        _change_node(model, rng.choice(nodes), how, rng)
    elif how in ("dims", "type", "bytes") and tensors:
        tensor = rng.choice(tensors)
        if how == "dims":
            tensor.dims[:] = rng.choice(([], [0], [-1], [2**40], [2**31, 2**31], [1] * 2000, list(tensor.dims)[::-1]))
        elif how == "type":
            tensor.data_type = rng.choice((0, 1, 2, 3, 6, 7, 8, 9, 10, 16, 21, 22, 23, 99, -1, 2**31 - 1))
        else:
            tensor.raw_data = rng.choice(BYTES)(tensor.raw_data, rng)
    elif how == "opset" and model.opset_import:
        model.opset_import[0].version = rng.choice((0, -1, 1, 7, 99, 2**40))
        model.opset_import[0].domain = rng.choice(("", "", "x", "ai.onnx"))
    elif how == "input" and model.graph.input:
        shape = model.graph.input[0].type.tensor_type.shape
        for dim in shape.dim[: rng.randint(0, 4)]:
            dim.dim_value = rng.choice((0, 1, 2, 3, 2**40, -1))
    elif how == "notes":
        entry = model.metadata_props.add()
        entry.key = "calibquant.notes"
        entry.value = rng.choice(("3", "{", "[" * 50_000, "null", '["\\ud800"]', "[[]]", '"x"', "9" * 5000))
    return bytes(model.SerializeToString())


def _change_node(model: onnx.ModelProto, node: onnx.NodeProto, how: str, rng: Random) -> None:
    names = [name for other in model.graph.node for name in (*other.input, *other.output)]
    if how == "op":
        node.op_type = rng.choice(
            ("", "Conv", "Clip", "Min", "Max", "Loop", "QuantizeLinear", "Relu", "Add", "é", "x" * 9999)
        )
    elif how == "attribute" and node.attribute:
        attribute = rng.choice(list(node.attribute))
        attribute.ints[:] = rng.choice(([], [0, 0], [-1, -1], [2**40, 2**40], [1] * 5, [65_535] * 4))
        attribute.i = rng.choice((0, -1, 2**40, 7))
    elif how == "edge" and node.input:
        node.input[rng.randrange(len(node.input))] = rng.choice(("", "nowhere", *names))
    elif how == "drop":
        part = rng.choice((node.input, node.output))
        del part[rng.randrange(len(part) + 1) :]
    elif how == "cycle" and node.output:
        node.input[:] = [*node.output, *node.input[1:]]


ONNX: tuple[Mutator, ...] = (change_onnx, change_onnx, change_onnx)
