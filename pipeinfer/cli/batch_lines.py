"""Lines of a batch, in the form of OpenAI's batch files: requests as they are read, answers as they are written."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

from pipeinfer.serve.errors import ApiError, invalid

MAX_LINE_NBYTES = 4 << 20
"""A longer line is refused: as long as the longest body of `pipeinfer serve`."""
IS_CHAT = {"/v1/completions": False, "/v1/chat/completions": True}
"""The urls of a batch line, and whether each takes a chat."""
FIELDS = {"custom_id", "method", "url", "body"}
OUTPUT_BEGINS = b'{"id":"batch_req_'
"""The first bytes of every output line."""
MOST_SHOWN = 60  # characters of a text that an error message repeats


@dataclass(frozen=True, slots=True)
class Line:
    """Line ``number`` of the input, counted from 1. ``custom_id``: its own, or ``line-N`` if it has none that can be
    used. ``end``: bytes of the input up to the end of this line. ``body``: the JSON of the request, unless ``error``
    says why there is none."""

    number: int
    custom_id: str
    end: int
    body: bytes = b""
    is_chat: bool = False
    error: ApiError | None = None


def read_lines(file: BinaryIO) -> Iterator[Line]:
    """The lines of ``file``, one at a time; blank lines are left out. Of the lines before only the ids are kept."""
    seen = set[str]()
    number = end = 0
    while data := file.readline(MAX_LINE_NBYTES + 1):
        number, end = number + 1, end + len(data)
        is_too_long = len(data) > MAX_LINE_NBYTES and not data.endswith(b"\n")
        if is_too_long:
            end += _skip_line(file)
        elif not data.strip():
            continue
        line = _read(number, end, None if is_too_long else data)
        if line.custom_id in seen:
            said = f"an earlier line has the custom_id {_shown(line.custom_id)}, too; ids must differ"
            line = _bad(number, end, None, ApiError(400, said, "custom_id", "duplicate_custom_id"))
        seen.add(line.custom_id)
        yield line


def _skip_line(file: BinaryIO) -> int:
    """Read the rest of a line and forget it; its length in bytes."""
    nbytes = 0
    while part := file.readline(MAX_LINE_NBYTES):
        nbytes += len(part)
        if part.endswith(b"\n"):
            break
    return nbytes


def _bad(number: int, end: int, custom_id: str | None, error: ApiError) -> Line:
    return Line(number, custom_id or f"line-{number}", end, error=error)


def _read(number: int, end: int, data: bytes | None) -> Line:
    """The line with the bytes ``data``, or None for one that is too long."""
    custom_id = None
    try:
        fields = _object(data)
        custom_id = _custom_id(fields)
        body, is_chat = _request(fields)
    except ApiError as error:
        return _bad(number, end, custom_id, error)
    return Line(number, custom_id or f"line-{number}", end, json.dumps(body).encode(), is_chat)


def _object(data: bytes | None) -> dict[str, Any]:
    if data is None:
        raise invalid(None, f"the line is longer than {MAX_LINE_NBYTES} bytes")
    try:
        found = json.loads(data.decode("utf-8-sig"))  # some programs begin a file with a mark
    except (ValueError, RecursionError) as error:
        said = f"the line is not JSON ({str(error) or type(error).__name__})"
        raise ApiError(400, said, None, "invalid_json_line") from None
    if not isinstance(found, dict):
        raise ApiError(400, "the line is not a JSON object", None, "invalid_json_line")
    return found


def _custom_id(fields: Mapping[str, Any]) -> str | None:
    found = fields.get("custom_id")
    if found is None:
        return None
    if not isinstance(found, str) or not found:
        raise invalid("custom_id", f"custom_id must be a text, not {_shown(found)}")
    return found


def _request(fields: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """The body, and whether it is a chat's. A line without a body is one itself, if it has a prompt or messages."""
    if "body" not in fields and not {"prompt", "messages"} & fields.keys():
        raise invalid("body", "the line has no body (nor a prompt or messages)")
    if "body" in fields:
        for name in fields.keys() - FIELDS:
            raise invalid(name[:MOST_SHOWN], f"unknown field {_shown(name)} beside the body; leave it out")
    outer = ("custom_id", "method", "url")
    body = fields.get("body", {name: value for name, value in fields.items() if name not in outer})
    if not isinstance(body, dict):
        raise invalid("body", f"body must be an object, not {_shown(body)}")
    if fields.get("method") not in (None, "POST"):
        raise invalid("method", f"method must be POST, not {_shown(fields['method'])}")
    url = fields.get("url")
    if url is not None and (not isinstance(url, str) or url not in IS_CHAT):
        raise invalid("url", f"url must be {' or '.join(IS_CHAT)}, not {_shown(url)}")
    if body.get("stream"):
        raise invalid("stream", "a batch has no streams; leave stream out")
    return body, "messages" in body if url is None else IS_CHAT[url]


def _shown(value: object) -> str:
    said = json.dumps(value)
    return said if len(said) <= MOST_SHOWN else said[:MOST_SHOWN] + "..."


def answer_line(line: Line, body: Mapping[str, Any]) -> bytes:
    """The output line of a request that was served; ``body``: OpenAI's response object."""
    return _output(line, 200, body, None)


def error_line(line: Line, error: ApiError) -> bytes:
    """The output line of a request that was not served. Its error names the number of the input line."""
    told = {"code": error.code or "invalid_request", "message": f"line {line.number}: {error}", "line": line.number}
    if error.status >= 500:
        told["code"] = "server_error"
    return _output(line, error.status, error.body(), told)


def _output(line: Line, status: int, body: Mapping[str, Any], error: Mapping[str, Any] | None) -> bytes:
    response = {"status_code": status, "request_id": f"req_{uuid.uuid4().hex}", "body": body}
    whole = {
        "id": f"batch_req_{uuid.uuid4().hex}",
        "custom_id": line.custom_id,
        "response": response,
        "error": error,
    }
    return json.dumps(whole, allow_nan=False, separators=(",", ":")).encode() + b"\n"
