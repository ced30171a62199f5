"""Recorded requests become rows of bounded pages, whatever an agent recorded."""

from pam_platform.web.exchanges import PAGE_SIZE, page


def request(number, **more):
    return {"t": 1.0, "c": 1, "kind": "request", "id": number, "method": "GET", "url": f"/{number}", **more}


def response(number, **more):
    return {"t": 2.0, "c": 1, "kind": "response", "id": number, "status": 200, "body_bytes": 5, **more}


def test_pages_follow_each_other_without_gap():
    events = [one for number in range(PAGE_SIZE + 3) for one in (request(number), response(number))]
    first = page(iter(events), 0)
    assert [row.url for row in first.rows] == [f"/{number}" for number in range(PAGE_SIZE)]
    assert first.rows[7].event == 14
    second = page(iter(events), first.following)
    assert [row.url for row in second.rows] == [f"/{number}" for number in range(PAGE_SIZE, PAGE_SIZE + 3)]
    assert second.following is None


def test_a_row_says_what_there_is_to_say():
    socket = [request(1), response(1, status=101, body_bytes=None)]
    socket += [
        {"t": 3, "c": 1, "kind": "ws", "id": 1, "dir": "up", "opcode": "text", "data": "a", "bytes": 1}
    ] * 2
    (row,) = page(socket, 0).rows
    assert (row.clock, row.method, row.status, row.note) == (
        "0:00:01.000",
        "GET",
        "101",
        "WebSocket, 2 messages",
    )
    assert (row.sent, row.received, row.milliseconds, row.failed) == (2, 0, "2000", False)
    (row,) = page([request(1)], 0).rows
    assert (row.status, row.failed, row.note) == ("none", True, "no answer was recorded")
    cut = {"t": 3, "c": 1, "kind": "body", "id": 1, "dir": "down", "bytes": 9, "done": True, "cut": True}
    (row,) = page([request(1), response(1, body_bytes=None), cut], 0).rows
    assert (row.received, row.note) == (9, "cut off")


def test_any_json_is_taken():
    odd = [{"kind": "request"}, {"t": None, "c": "x", "kind": "response", "status": "y"}, {"kind": None}]
    assert len(page([*odd, request(1, url=7, method=None, t="z")], 0).rows) == 2
