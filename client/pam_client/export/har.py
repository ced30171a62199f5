"""A web session's recording for the network panel of a browser's developer tools: HAR 1.2.

http://www.softwareishard.com/blog/har-12-spec/. What a recording does not hold (a binary body, one beyond the
budget) is told by its size and hash. Secrets were taken out before anything was recorded.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any
from urllib.parse import parse_qsl

from pam_common.errors import PamError
from pam_common.exchanges import Exchange, Message, exchanges, seconds, time_of

#: Opcodes of RFC 6455, as the developer tools show them.
_OPCODES = {"text": 1, "binary": 2, "close": 8}
_FORM = "application/x-www-form-urlencoded"
#: Parameters of one address or form; none that was written by hand has more.
_MAX_PARAMETERS = 1000


def har(
    events: Callable[[], Iterator[dict[str, Any]]], session: dict[str, Any], _terminal: int
) -> Iterator[str]:
    """The file's text, an entry at a time; entries stand in the order in which they ended. Raises PamError
    when it was no session of a web application."""
    if session.get("protocol") != "http":
        raise PamError(
            f"har is for web applications, and this session's protocol is {session.get('protocol')}",
            hint="--export ndjson has every event of it.",
        )
    begin = seconds(session.get("started"))
    creator = {"name": "pam-client", "version": version("pam-bundle")}
    title = f"{session.get('account', '')} {session.get('id', '')}".strip()
    opening = {"version": "1.2", "creator": creator, "pages": [], "comment": title}
    yield '{"log": ' + json.dumps(opening)[:-1] + ', "entries": ['
    separator = "\n"
    for exchange in exchanges(events()):
        yield separator + json.dumps(_entry(exchange, begin))
        separator = ",\n"
    yield "\n]}}\n"


def _entry(exchange: Exchange, begin: float) -> dict[str, Any]:
    waited = max(0.0, (exchange.response.at - exchange.request.at) * 1000) if exchange.status else 0.0
    total = max(exchange.milliseconds, waited)
    entry: dict[str, Any] = {
        "startedDateTime": _moment(begin + exchange.request.at),
        "time": round(total, 3),
        "request": _request(exchange),
        "response": _response(exchange),
        "cache": {},
        "timings": {"send": 0, "wait": round(waited, 3), "receive": round(total - waited, 3)},
        "connection": f"{exchange.part}.{exchange.connection}",
    }
    if exchange.status == 101:
        entry["_resourceType"] = "websocket"
        entry["_webSocketMessages"] = [_message(event, begin) for event in exchange.sockets]
    if exchange.refused:
        entry["comment"] = exchange.refused
    return entry


def _request(exchange: Exchange) -> dict[str, Any]:
    message = exchange.request
    found: dict[str, Any] = {
        "method": exchange.method,
        "url": exchange.url,
        "httpVersion": _version(message),
        "cookies": [_named(pair) for pair in message.header("cookie").split(";") if pair.strip()],
        "headers": _headers(message),
        "queryString": _parameters(exchange.url.partition("?")[2].partition("#")[0]),
        "headersSize": -1,
        "bodySize": message.size,
    }
    if message.size:
        kind = message.header("content-type")
        found["postData"] = {"mimeType": kind, "text": message.text, **_comment(message)}
        if kind.partition(";")[0].strip().lower() == _FORM:
            found["postData"]["params"] = _parameters(message.text)
    return found


def _response(exchange: Exchange) -> dict[str, Any]:
    """An exchange without an answer has status 0, as the developer tools write it."""
    message = exchange.response
    cookies = [value for name, value in message.headers if name.lower() == "set-cookie"]
    content: dict[str, Any] = {
        "size": message.size,
        "mimeType": message.header("content-type") or "x-unknown",
        **_comment(message),
    }
    if message.text:
        content["text"] = message.text
    return {
        "status": exchange.status,
        "statusText": str(message.fields.get("reason") or ""),
        "httpVersion": _version(message),
        "cookies": [_set_cookie(value) for value in cookies],
        "headers": _headers(message),
        "content": content,
        "redirectURL": message.header("location"),
        "headersSize": -1,
        "bodySize": message.size,
    }


def _comment(message: Message) -> dict[str, str]:
    """What is to be said of a body besides its text."""
    words = []
    if len(message.text.encode(errors="replace")) < message.size:
        words.append(f"{message.size} bytes, not all of them recorded")
    if message.sha256:
        words.append(f"sha256 {message.sha256}")
    if message.cut:
        words.append("cut off")
    return {"comment": "; ".join(words)} if words else {}


def _message(event: dict[str, Any], begin: float) -> dict[str, Any]:
    """One message of a socket, as the developer tools of Chromium write it."""
    return {
        "type": "send" if event.get("dir") == "up" else "receive",
        "time": round(begin + time_of(event), 6),
        "opcode": _OPCODES.get(str(event.get("opcode")), 0),
        "data": str(event.get("data") or event.get("base64") or ""),
    }


def _headers(message: Message) -> list[dict[str, str]]:
    return [{"name": name, "value": value} for name, value in message.headers]


def _version(message: Message) -> str:
    said = message.fields.get("version")
    return f"HTTP/{said}" if isinstance(said, str) else ""


def _parameters(text: str) -> list[dict[str, str]]:
    try:
        pairs = parse_qsl(text, keep_blank_values=True, max_num_fields=_MAX_PARAMETERS)
    except ValueError:
        return []
    return [{"name": name, "value": value} for name, value in pairs]


def _named(pair: str) -> dict[str, str]:
    name, _, value = pair.strip().partition("=")
    return {"name": name, "value": value}


def _set_cookie(value: str) -> dict[str, Any]:
    pair, *attributes = value.split(";")
    found: dict[str, Any] = dict(_named(pair))
    named = {one["name"].lower(): one["value"] for one in map(_named, attributes)}
    found |= {name: named[name] for name in ("path", "domain") if name in named}
    return found | {"httpOnly": "httponly" in named, "secure": "secure" in named}


def _moment(seconds: float) -> str:
    try:
        return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")
    except (ValueError, OverflowError, OSError):
        return datetime.fromtimestamp(0, UTC).isoformat(timespec="milliseconds")
