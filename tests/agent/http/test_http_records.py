"""What stands in a recording of an app: bodies up to a budget, messages of sockets, and no secret."""

from __future__ import annotations

import base64
import gzip
import hashlib
import itertools
import json
import struct
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from wsproto.frame_protocol import FrameProtocol, Opcode

from pam_agent.protocols.base import ClientProtocolError, TargetProtocolError
from pam_agent.protocols.http import bodies
from pam_agent.protocols.http.bodies import Body
from pam_agent.protocols.http.frames import Frames
from pam_agent.protocols.http.redact import REDACTED, Redactor, basic
from pam_agent.protocols.http.rules import RuleError, Rules
from pam_agent.protocols.http.wire import PIECE, Response

SECRET = "correct horse/battery"
REDACTOR = Redactor([SECRET, basic("viewer", SECRET)], ["X-Api".lower()], lambda: ["jar-value-1"])


def head(kind: str = "text/plain", **fields: str) -> Response:
    given_fields = [(b"Content-Type", kind.encode())]
    given_fields += [(name.replace("_", "-").encode(), text.encode()) for name, text in fields.items()]
    return Response(fields=given_fields, chunked=False, length=None)


def body(kind: str = "text/plain", budget: int = 1000, **fields: str) -> Body:
    return Body(head(kind, **fields), 7, "down", budget, REDACTOR)


# --- bodies ----------------------------------------------------------------------------------------------


def test_http_a_body_that_is_whole_stands_in_its_event():
    assert body().whole(b"") == {"body_bytes": 0}
    assert body().whole("grün".encode()) == {"body_bytes": 5, "body": "grün"}
    assert body("text/plain; charset=latin1").whole(b"gr\xfcn")["body"] == "grün"
    assert body("text/plain; charset=unheard-of").whole("grün".encode())["body"] == "grün"
    assert body("text/plain; charset=utf-7").whole(b"a+-b")["body"] == "a+-b"
    assert body().whole(b"\xff")["body"] == "�"


def test_http_a_body_over_its_budget_is_counted_and_hashed():
    whole = body(budget=5).whole(b"0123456789")
    assert whole == {
        "body_bytes": 10,
        "body": "01234",
        "body_sha256": hashlib.sha256(b"0123456789").hexdigest(),
    }
    assert "body" not in body(budget=0).whole(b"0123456789")


@pytest.mark.parametrize(
    "kind", ["image/png", "application/octet-stream", "multipart/form-data; boundary=x", ""]
)
def test_http_a_body_that_is_no_text_is_counted_and_hashed(kind):
    assert body(kind).whole(b"ab") == {"body_bytes": 2, "body_sha256": hashlib.sha256(b"ab").hexdigest()}


@pytest.mark.parametrize(
    "kind",
    ["application/json", "application/ld+json", "text/html", "image/svg+xml", "application/javascript"],
)
def test_http_kinds_of_text(kind):
    assert body(kind).whole(b"ab")["body"] == "ab"


@given(st.binary(max_size=300), st.lists(st.integers(0, 300), max_size=8), st.integers(0, 300))
@settings(max_examples=200, deadline=None)
def test_http_pieces_of_a_body_say_the_same_as_the_whole(data, cuts, budget):
    edges = sorted({0, len(data), *(min(cut, len(data)) for cut in cuts)})
    one = body(budget=budget)
    events = [event for a, b in itertools.pairwise(edges) for event in one.take(data[a:b])]
    last = one.end(ms=1.5)
    assert last == {
        "kind": "body",
        "id": 7,
        "dir": "down",
        "bytes": len(data),
        "done": True,
        "sha256": hashlib.sha256(data).hexdigest(),
        "ms": 1.5,
    }
    text = "".join(event["data"] for event in events)
    assert data[:budget].decode("utf-8", "replace").startswith(text)
    if len(data) <= budget and data.isascii():
        assert text == data.decode()


def test_http_a_long_transfer_is_counted_on_its_way():
    one = body("application/octet-stream")
    events = []
    pieces = 2 * bodies.PROGRESS // PIECE
    for _ in range(pieces):
        events += one.take(bytes(PIECE))
    assert [event["bytes"] for event in events] == [bodies.PROGRESS, 2 * bodies.PROGRESS]


def test_http_compressed_text_is_recorded_as_text():
    data = gzip.compress(b"the text " * 50)
    assert body(Content_Encoding="gzip").whole(data)["body"] == "the text " * 50
    one = body(Content_Encoding="gzip")
    text = "".join(e["data"] for n in range(len(data)) for e in one.take(data[n : n + 1]))
    assert text == "the text " * 50
    assert body(Content_Encoding="gzip").whole(b"no gzip") == {
        "body_bytes": 7,
        "body_sha256": hashlib.sha256(b"no gzip").hexdigest(),
    }
    assert "body" not in body(Content_Encoding="br").whole(b"x")


def test_abuse_21_a_compressed_bomb_costs_its_budget_and_no_more():
    bomb = gzip.compress(bytes(200 << 20))
    tracemalloc.start()
    try:
        one = body(budget=16 << 20, Content_Encoding="gzip")
        text = "".join(
            e.get("data", "") for n in range(0, len(bomb), PIECE) for e in one.take(bomb[n : n + PIECE])
        )
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(text) <= PIECE
    assert peak < 4 << 20
    assert one.end()["bytes"] == len(bomb)


def test_abuse_21_what_follows_a_compressed_body_is_not_kept():
    one = body(budget=16 << 20, Content_Encoding="gzip")
    assert one.take(gzip.compress(b"text"))[0]["data"] == "text"
    tracemalloc.start()
    try:
        for _ in range(400):
            assert one.take(bytes(PIECE)) == []
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20


def test_http_every_event_of_a_body_fits_a_recording():
    one = body(budget=16 << 20)
    for data in (b"\0" * PIECE, b"\xff" * PIECE, "𝄞".encode() * (PIECE // 4)):
        for event in one.take(data):
            assert len(json.dumps(event)) < 1 << 20


def test_http_a_form_is_recorded_whole_or_not_at_all():
    form = b"username=a&password=hunter2&note=x"
    kind = "application/x-www-form-urlencoded"
    assert body(kind).whole(form)["body"] == f"username=a&password={REDACTED}&note=x"
    # In pieces a name may be in one and its value in the next.
    one = body(kind)
    assert one.take(form[:20]) == []
    assert one.take(form[20:]) == []


# --- secrets ---------------------------------------------------------------------------------------------


def test_http_headers_lose_their_secrets():
    fields = [
        (b"Authorization", b"Basic abc"),
        (b"Cookie", b"a=1; b=2"),
        (b"Set-Cookie", b"a=1; Path=/"),
        (b"X-Api", b"k"),
        (b"X-CSRF-Token", b"t"),
        (b"X-Auth-Request", b"t"),
        (b"Referer", b"https://x/?token=t&page=2"),
        (b"Location", b"/cb?code=c&state=s"),
        (b"X-Echo", f"got {SECRET}".encode()),
        (b"Accept", b"*/*"),
    ]
    assert REDACTOR.fields(fields) == [
        ["Authorization", REDACTED],
        ["Cookie", f"a={REDACTED}; b={REDACTED}"],
        ["Set-Cookie", f"a={REDACTED}; Path=/"],
        ["X-Api", REDACTED],
        ["X-CSRF-Token", REDACTED],
        ["X-Auth-Request", REDACTED],
        ["Referer", f"https://x/?token={REDACTED}&page=2"],
        ["Location", f"/cb?code={REDACTED}&state=s"],
        ["X-Echo", f"got {REDACTED}"],
        ["Accept", "*/*"],
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"password": "hunter2", "a": 1}', f'{{"password": "{REDACTED}", "a": 1}}'),
        (r'{"apiKey":"a\"b","x":"y"}', f'{{"apiKey":"{REDACTED}","x":"y"}}'),
        ('{"user": "me"}', '{"user": "me"}'),
        ('{"password": "cut', f'{{"password": "{REDACTED}'),
        (f"it is {SECRET}!", f"it is {REDACTED}!"),
        ("correct%20horse%2Fbattery", REDACTED),
        ("correct+horse%2Fbattery", REDACTED),
        (basic("viewer", SECRET), REDACTED),
        ("sid is jar-value-1", f"sid is {REDACTED}"),
    ],
)
def test_http_texts_lose_their_secrets(text, expected):
    assert REDACTOR.text(text) == expected


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("/x?password=p&a=b", f"/x?password={REDACTED}&a=b"),
        ("/x?a=b;secret=c", f"/x?a=b;secret={REDACTED}"),
        ("/x#access_token=c", f"/x#access_token={REDACTED}"),
        ("/password/x", "/password/x"),
    ],
)
def test_http_addresses_lose_their_secrets(url, expected):
    assert REDACTOR.address(url) == expected


@pytest.mark.parametrize(
    "written",
    [
        "p&ss <w>'ö\\",
        "p&amp;ss &lt;w&gt;&#x27;ö\\",
        "p&amp;ss &lt;w&gt;'ö\\",
        "p&ss <w>'ö\\\\",
        "p&ss <w>'\\u00f6\\\\",
        "p%26ss%20%3Cw%3E%27%C3%B6%5C",
        "p%26ss+%3Cw%3E%27%C3%B6%5C",
    ],
)
def test_http_a_known_secret_is_found_however_it_is_written(written):
    redactor = Redactor(["p&ss <w>'ö\\"], [], list)
    assert redactor.known(f"a {written} b") == f"a {REDACTED} b"


def test_http_binary_messages_lose_known_secrets_and_nothing_else():
    redactor = Redactor(["correct horse"], [], list)
    data = b"\xff\x00correct horse\xfe\x80"
    assert redactor.binary(data) == b"\xff\x00" + REDACTED.encode() + b"\xfe\x80"
    assert redactor.binary(bytes(range(256))) == bytes(range(256))


def test_http_a_redactor_shows_nothing():
    assert SECRET not in repr(REDACTOR)


# --- sockets ---------------------------------------------------------------------------------------------


def frames(way: str = "up", budget: int = 100, rules: Rules | None = None) -> Frames:
    return Frames(3, way, budget, REDACTOR, rules or Rules())


def written(*messages: tuple[Opcode, bytes, bool], client: bool = True) -> bytes:
    protocol = FrameProtocol(client=client, extensions=[])
    out = b""
    for opcode, payload, fin in messages:
        if opcode.iscontrol():
            out += (
                protocol.close(*struct.unpack(">H", payload[:2]), payload[2:].decode())
                if opcode is (Opcode.CLOSE)
                else protocol.ping(payload)
            )
        else:
            data = payload.decode() if opcode is Opcode.TEXT else payload
            out += protocol.send_data(data, fin)
    return out


def test_http_messages_of_a_socket_are_recorded():
    one = frames()
    data = written(
        (Opcode.TEXT, '{"password":"hunter2"} grün'.encode(), True),
        (Opcode.PING, b"x", True),
        (Opcode.BINARY, b"\0\1", True),
        (Opcode.CLOSE, b"\x03\xe8bye", True),
    )
    assert one.feed(data) == [
        {
            "kind": "ws",
            "id": 3,
            "dir": "up",
            "opcode": "text",
            "bytes": 28,
            "data": f'{{"password":"{REDACTED}"}} grün',
        },
        {"kind": "ws", "id": 3, "dir": "up", "opcode": "binary", "bytes": 2, "base64": "AAE="},
        {"kind": "ws", "id": 3, "dir": "up", "opcode": "close", "code": 1000, "data": "bye", "bytes": 5},
    ]
    assert one.at_boundary


@given(
    st.lists(st.binary(max_size=150), max_size=5), st.lists(st.integers(0, 2000), max_size=10), st.booleans()
)
@settings(max_examples=200, deadline=None)
def test_http_frames_any_split_says_the_same(payloads, cuts, client):
    data = written(*((Opcode.BINARY, payload, True) for payload in payloads), client=client)
    edges = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    one = frames("up" if client else "down", budget=100)
    events = [event for a, b in itertools.pairwise(edges) for event in one.feed(data[a:b])]
    found, current = [], b""
    for event in events:
        current += base64.b64decode(event.get("base64", ""))
        if not event.get("more"):
            found.append((event["bytes"], current, event.get("sha256")))
            current = b""
    assert found == [
        (
            len(payload),
            payload[:100],
            hashlib.sha256(payload).hexdigest() if len(payload) > 100 else None,
        )
        for payload in payloads
    ]
    assert one.at_boundary


def test_http_a_long_message_is_recorded_up_to_its_budget():
    one = frames(budget=10)
    events = one.feed(written((Opcode.TEXT, b"0123456789abc", True)))
    assert events[0]["data"] == "0123456789"
    assert events[0]["sha256"] == hashlib.sha256(b"0123456789abc").hexdigest()


@pytest.mark.parametrize(
    "data",
    [
        b"\x83\x80\0\0\0\0",  # an unknown kind
        b"\xc1\x80\0\0\0\0",  # a reserved bit: an extension that nobody agreed to
        b"\x81\x01a",  # a client's frame without a mask
        b"\x80\x80\0\0\0\0",  # the end of a message that never began
        b"\x89\xfe\x01\x00",  # a ping that is too long
        b"\x81\x82\0\0\0\0\xff\xff",  # text that is none
        b"\x82\xff\xff\xff\xff\xff\xff\xff\xff\xff\0\0\0\0",  # a length beyond all
    ],
)
def test_http_frames_that_cannot_be_read_are_refused(data):
    with pytest.raises(ClientProtocolError):
        frames().feed(data)
    with pytest.raises(TargetProtocolError):
        frames("down").feed(b"\x81\x81\0\0\0\0a")  # a server's frame with a mask


def test_http_a_users_message_is_held_to_the_largest_request():
    rules = Rules(max_request=10)
    frames(rules=rules).feed(written((Opcode.BINARY, bytes(10), True)))
    with pytest.raises(RuleError):
        frames(rules=rules).feed(written((Opcode.BINARY, bytes(6), False), (Opcode.BINARY, bytes(6), True)))
    frames("down", rules=rules).feed(written((Opcode.BINARY, bytes(11), True), client=False))
