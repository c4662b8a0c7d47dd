"""KServe v2 requests and responses ↔ tensors: plain JSON, and Triton's binary tensor data extension.

    body, Inference-Header-Content-Length → read_request → TensorRequest(inputs: Tensor …, outputs)
    Tensor … → write_response → body, Inference-Header-Content-Length

    {"inputs": [{"name", "shape", "datatype", "parameters": {"binary_data_size": 12}}, …]}  12 bytes  …
    └─────────── JSON, as long as Inference-Header-Content-Length says ───────────────────┘ └ in the order of the JSON

Numbers are little-endian and row by row. BYTES is, element by element, a length of 4 bytes and that many bytes; in JSON it
is a string. Nothing is trusted: a shape is compared with the bytes that are there before anything is made of it.

Reference: KServe's Open Inference Protocol v2 (REST), and Triton's "Binary Tensor Data Extension".
"""

import json
import math
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, ValidationError

from actors.errors import BadRequest

HEADER_LENGTH = "Inference-Header-Content-Length"
MAX_STRINGS = 10_000  # elements of a BYTES tensor: each becomes a Python object
Name = Annotated[str, Field(max_length=128)]
_NUMBERS = {"FP32": np.dtype("<f4"), "INT32": np.dtype("<i4")}


@dataclass(frozen=True, slots=True)
class Tensor:
    """A named array on its way in or out.

    Attributes:
        name: as the model's metadata has it.
        datatype: FP32 or BYTES; out also INT32.
        values: the array; for BYTES of dtype object, holding ``bytes``.
        from_json: it stood in the JSON, where BYTES can only be text.
    """

    name: str
    datatype: str
    values: NDArray[Any]
    from_json: bool = False


class InputParameters(BaseModel):
    """``parameters`` of an input. Shared memory is not among them."""

    model_config = ConfigDict(extra="forbid")

    binary_data_size: Annotated[StrictInt, Field(ge=0, le=1 << 40)] | None = None


class OutputParameters(BaseModel):
    """``parameters`` of a requested output; ``binary_data`` None leaves it to the request's ``binary_data_output``."""

    model_config = ConfigDict(extra="forbid")

    binary_data: StrictBool | None = None


class InputHeader(BaseModel):
    """An input as the JSON describes it."""

    name: Name
    datatype: Name
    shape: Annotated[list[Annotated[StrictInt, Field(ge=1, lt=1 << 31)]], Field(max_length=8)]
    parameters: InputParameters = InputParameters()
    data: list[Any] | None = None


class OutputHeader(BaseModel):
    """An output that the client wants."""

    name: Name
    parameters: OutputParameters = OutputParameters()


class RequestHeader(BaseModel):
    """The JSON of an inference request; keys that it does not know are ignored, as the protocol's own examples have some."""

    id: str = ""
    parameters: dict[str, Any] = {}
    inputs: Annotated[list[InputHeader], Field(min_length=1, max_length=16)]
    outputs: Annotated[list[OutputHeader], Field(max_length=64)] | None = None


@dataclass(frozen=True, slots=True)
class TensorRequest:
    """An inference request with its tensors.

    Attributes:
        id: the client's own, to be answered with.
        parameters: of the request, not looked at yet.
        inputs: the tensors, in the client's order.
        outputs: what the client wants; None for all.
    """

    id: str
    parameters: dict[str, Any]
    inputs: tuple[Tensor, ...]
    outputs: tuple[OutputHeader, ...] | None


def read_request(body: bytes, header_length: str | None) -> TensorRequest:
    """Read an inference request.

    Args:
        body: the whole body, decompressed.
        header_length: the header ``Inference-Header-Content-Length``; without it all of ``body`` is JSON.

    Raises:
        BadRequest: JSON, lengths, shapes and data do not fit each other, or ask for what is not supported.
    """
    text, rest = _split(body, header_length)
    try:
        header = RequestHeader.model_validate_json(text)
    except ValidationError as error:
        raise bad_request(error) from error
    inputs = []
    for each in header.inputs:
        size = each.parameters.binary_data_size
        if size is None:
            inputs.append(_from_json(each))
            continue
        if each.data is not None:
            raise BadRequest(f"Input '{each.name}' has 'data' and a 'binary_data_size': send one of them")
        if size > len(rest):
            raise BadRequest(f"Input '{each.name}' has a 'binary_data_size' of {size}, but {len(rest)} bytes are left")
        inputs.append(_from_binary(each, rest[:size]))
        rest = rest[size:]
    if rest:
        raise BadRequest(f"{len(rest)} bytes follow the last tensor: correct {HEADER_LENGTH} or 'binary_data_size'")
    outputs = None if header.outputs is None else tuple(header.outputs)
    return TensorRequest(header.id, header.parameters, tuple(inputs), outputs)


def write_response(head: dict[str, Any], outputs: Sequence[Tensor], binary: Collection[str]) -> tuple[bytes, int | None]:
    """Write an inference response.

    Args:
        head: its JSON but for the outputs.
        outputs: the tensors.
        binary: names of those that are written behind the JSON.

    Returns:
        The body, and the length of its JSON where tensors follow it.

    Raises:
        BadRequest: a NaN or an infinity is to be written as JSON.
    """
    entries, chunks = [], []
    for tensor in outputs:
        entry: dict[str, Any] = {"name": tensor.name, "datatype": tensor.datatype, "shape": list(tensor.values.shape)}
        if tensor.name in binary:
            chunks.append(_to_binary(tensor))
            entry["parameters"] = {"binary_data_size": len(chunks[-1])}
        else:
            flat = tensor.values.ravel().tolist()
            entry["data"] = [element.decode() for element in flat] if tensor.datatype == "BYTES" else flat
        entries.append(entry)
    try:
        text = json.dumps(head | {"outputs": entries}, allow_nan=False, ensure_ascii=False).encode()
    except ValueError as error:
        raise BadRequest("An output holds NaN or infinity, which JSON cannot: ask for it with 'binary_data'") from error
    return b"".join((text, *chunks)), len(text) if chunks else None


def strings(elements: Sequence[bytes]) -> NDArray[np.object_]:
    """A one-dimensional BYTES array."""
    array = np.empty(len(elements), object)
    array[:] = elements
    return array


def bad_request(error: ValidationError) -> BadRequest:
    """The first thing that pydantic found, as one sentence."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    field = ".".join(map(str, first["loc"]))
    if first["type"] == "extra_forbidden":
        return BadRequest(f"'{field}' is not supported here: leave it out")
    return BadRequest(f"'{field}': {first['msg']}" if field else f"The request is not readable: {first['msg']}")


def _split(body: bytes, header_length: str | None) -> tuple[bytes, memoryview]:
    if header_length is None:
        return body, memoryview(b"")
    if not re.fullmatch("[0-9]{1,12}", header_length) or int(header_length) > len(body):
        raise BadRequest(f"{HEADER_LENGTH} has to be the length of the JSON, at most the body's {len(body)} bytes")
    length = int(header_length)
    return body[:length], memoryview(body)[length:]


def _from_binary(header: InputHeader, chunk: memoryview) -> Tensor:
    if header.datatype == "BYTES":
        return Tensor(header.name, "BYTES", _read_strings(header, chunk).reshape(header.shape))
    dtype = _number_type(header)
    needed = math.prod(header.shape) * dtype.itemsize
    if needed != len(chunk):
        raise BadRequest(f"Input '{header.name}' of shape {header.shape} takes {needed} bytes; it has {len(chunk)}")
    return Tensor(header.name, header.datatype, np.frombuffer(chunk, dtype).reshape(header.shape))


def _read_strings(header: InputHeader, chunk: memoryview) -> NDArray[np.object_]:
    elements: list[bytes] = []
    _check_count(header)
    position = 0
    while position < len(chunk):
        start = position + 4
        position = start + int.from_bytes(chunk[position:start], "little")
        if start > len(chunk) or position > len(chunk) or len(elements) == math.prod(header.shape):
            break
        elements.append(bytes(chunk[start:position]))
    if position != len(chunk) or len(elements) != math.prod(header.shape):
        raise BadRequest(
            f"Input '{header.name}' of shape {header.shape} does not hold that many elements, each with its length in front"
        )
    return strings(elements)


def _from_json(header: InputHeader) -> Tensor:
    if header.data is None:
        raise BadRequest(f"Input '{header.name}' has no data: send 'data', or 'binary_data_size' and bytes after the JSON")
    if header.datatype == "BYTES":
        _check_count(header)
        if not all(isinstance(element, str) for element in header.data):
            raise BadRequest(f"Input '{header.name}' is BYTES: its 'data' has to be a flat list of strings")
        values: NDArray[Any] = strings([element.encode() for element in header.data])
    else:
        values = _numbers(header)
    if values.size != math.prod(header.shape):
        raise BadRequest(f"Input '{header.name}' of shape {header.shape} has {values.size} elements in its 'data'")
    return Tensor(header.name, header.datatype, values.reshape(header.shape), from_json=True)


def _numbers(header: InputHeader) -> NDArray[Any]:
    dtype = _number_type(header)
    flat = list(_flat(header.data or []))
    if any(type(element) not in (int, float) for element in flat):  # before NumPy, which would make room for strings
        raise BadRequest(f"Input '{header.name}' is {header.datatype}: its 'data' has to be numbers")
    try:
        with np.errstate(over="ignore"):
            return np.array(flat, dtype)
    except OverflowError as error:
        raise BadRequest(f"Input '{header.name}' has a number that no {header.datatype} can hold") from error


def _flat(data: list[Any]) -> Iterator[Any]:
    """The elements of a list that may be nested, as the protocol allows."""
    for element in data:
        if isinstance(element, list):
            yield from _flat(element)
        else:
            yield element


def _number_type(header: InputHeader) -> np.dtype[Any]:
    if header.datatype != "FP32":
        raise BadRequest(f"Input '{header.name}' is {header.datatype[:20]}: send FP32, or BYTES for encoded images")
    return _NUMBERS[header.datatype]


def _check_count(header: InputHeader) -> None:
    if math.prod(header.shape) > MAX_STRINGS:
        raise BadRequest(f"Input '{header.name}' of shape {header.shape} has more than {MAX_STRINGS} elements: split it")


def _to_binary(tensor: Tensor) -> bytes:
    if tensor.datatype == "BYTES":
        return b"".join(len(element).to_bytes(4, "little") + element for element in tensor.values.ravel())
    return tensor.values.astype(_NUMBERS[tensor.datatype], copy=False).tobytes()
