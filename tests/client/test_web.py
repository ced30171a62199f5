"""Web applications at the local end: origins, the first line, the one-time link, the browser, refusals."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import hmac
import html
import itertools
import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from processes import free_port

from pam_client import place, ports
from pam_client.home import Home
from pam_client.launch import HTTP
from pam_client.web.opening import opened
from pam_client.web.origin import Origin
from pam_client.web.refusal import MAX_HEAD, HttpRefusal, starts_http
from pam_common.errors import PamError
from pam_common.keys import b64decode, b64encode

GET = b"GET / HTTP/1.1\r\nHost: here\r\n\r\n"
#: Prints what PAM_URL answers, and what the environment says of proxies.
FETCH = """
import os, urllib.request
print(urllib.request.urlopen(os.environ["PAM_URL"] + "/x").read().decode())
print(os.environ["no_proxy"], os.environ["NO_PROXY"])
"""


def tell(channel: Any) -> None:
    """An agent that answers one request with the first line that it heard."""
    heard = b""
    while b"\r\n\r\n" not in heard:
        data = channel.recv(65536)
        if not data:
            return
        heard += data
    line, _, request = heard.partition(b"\n")
    body = json.dumps({"line": line.decode(), "request": request.decode()}).encode()
    channel.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
    channel.shutdown(socket.SHUT_WR)
    while channel.recv(65536):
        pass


@pytest.fixture
def app(agency: Any, connecting: Any) -> Any:
    """The account grafana/viewer, of a web application."""
    agency.protocol, agency.serve = "http", tell
    return agency


@pytest.fixture
def browser(tmp_path: Path) -> Path:
    """A "browser" that only writes down what it was called with: the folder of its notes."""
    folder = tmp_path / "browser"
    folder.mkdir()
    script = folder / "run"
    script.write_text(f'#!/bin/sh\nprintf "%s" "$*" > {folder}/part && mv {folder}/part {folder}/called\n')
    script.chmod(0o700)
    return folder


@pytest.fixture
def stay(
    environment: dict[str, str], command: Callable[..., list[str]]
) -> Iterator[Callable[..., tuple[subprocess.Popen[str], str]]]:
    """Start ``connect``; gives the process and the line that it prints, once it listens."""
    started: list[subprocess.Popen[str]] = []

    def stay(*words: str, **extra: str) -> tuple[subprocess.Popen[str], str]:
        process = subprocess.Popen(
            command("connect", "grafana/viewer", *words),
            env=environment | extra,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            text=True,
        )
        started.append(process)
        assert process.stdout is not None
        return process, process.stdout.readline().strip()

    yield stay
    for process in started:
        process.kill()
        process.communicate(timeout=60)


def end(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    process.send_signal(signal.SIGINT)
    shown, said = process.communicate(timeout=60)
    return process.returncode, shown, said


def ask(host: str, port: int, request: bytes = GET) -> tuple[bytes, bytes]:
    """The answer's head and body."""
    with socket.create_connection((host, port), timeout=60) as program:
        program.sendall(request)
        head, _, body = program.makefile("rb").read().partition(b"\r\n\r\n")
        return head, body


# -- the origin ----------------------------------------------------------------------------------------


def test_an_account_has_an_origin_and_a_key_of_its_own() -> None:
    one, other = (Origin.for_browser(account, 42017) for account in ("grafana/viewer", "viewer/grafana"))
    assert one.url == "http://viewer.grafana.localhost:42017"
    assert other.url == "http://grafana.viewer.localhost:42017"
    assert len(one.key) == 32
    assert one.key != other.key
    assert b64encode(one.key) not in repr(one)


def test_the_first_line_of_a_browsers_connection() -> None:
    origin = Origin.for_browser("grafana/viewer", 42017)
    assert origin.preamble.endswith(b"}\n")
    assert origin.preamble.count(b"\n") == 1
    assert json.loads(origin.preamble) == {
        "v": 1,
        "mode": "browser",
        "origin": "http://viewer.grafana.localhost:42017",
        "key": b64encode(origin.key),
    }
    ticket = b64encode(hmac.new(origin.key, b"pam-web-link", hashlib.sha256).digest())
    assert origin.link == f"{origin.url}/.pam/enter?t={ticket}"


def test_the_first_line_of_a_programs_connection() -> None:
    line = Origin.for_programs(42018).preamble
    assert json.loads(line) == {"v": 1, "mode": "program", "origin": "http://127.0.0.1:42018"}


# -- connect, for a browser ----------------------------------------------------------------------------


def test_the_link_is_printed_where_no_browser_is_wanted(app: Any, stay: Any) -> None:
    process, line = stay("--no-open")
    found = re.fullmatch(r"http://viewer\.grafana\.localhost:(\d+)/\.pam/enter\?t=([A-Za-z0-9_-]{43})", line)
    assert found, line
    port = int(found[1])
    _, body = ask("127.0.0.1", port)
    said = json.loads(json.loads(body)["line"])
    assert said["origin"] == f"http://viewer.grafana.localhost:{port}"
    assert said["mode"] == "browser"
    key = b64decode(said["key"])
    assert b64decode(found[2]) == hmac.new(key, b"pam-web-link", hashlib.sha256).digest()
    assert json.loads(body)["request"] == GET.decode()
    code, _, rest = end(process)
    assert code == 0
    assert found[2] not in rest


def test_both_loopback_addresses_lead_to_it(app: Any, stay: Any) -> None:
    _, line = stay("--no-open")
    port = int(re.findall(r":(\d+)/", line)[0])
    first, second = (json.loads(ask(host, port)[1])["line"] for host in ("127.0.0.1", "::1"))
    assert first == second


def test_its_port_stays_the_same_from_day_to_day(app: Any, stay: Any, keep_port: Any) -> None:
    keep_port("grafana/viewer")
    process, line = stay("--no-open")
    end(process)
    _, again = stay("--no-open")
    assert line.partition("?")[0] == again.partition("?")[0]
    assert line != again, "the link is another one"


def test_the_browser_gets_a_private_file_and_no_link(
    app: Any, stay: Any, browser: Path, home: Home, wait_for: Any
) -> None:
    process, line = stay(BROWSER=str(browser / "run"), DISPLAY="")
    assert re.fullmatch(r"http://viewer\.grafana\.localhost:\d+/", line)
    wait_for((browser / "called").exists)
    called = (browser / "called").read_text()
    assert called.startswith(f"file://{home.folder}/open/s-"), called
    file = Path(called.removeprefix("file://"))
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    link = html.unescape(re.findall(r'href="([^"]+)"', file.read_text())[0])
    assert link.startswith(f"{line}.pam/enter?t=")
    ticket = link.partition("t=")[2]
    code, shown, said = end(process)
    assert code == 0
    assert ticket not in shown + said
    assert not file.exists()


def test_no_browser_is_said(app: Any, stay: Any) -> None:
    process, _ = stay(BROWSER="", DISPLAY="", WAYLAND_DISPLAY="")
    _, _, said = end(process)
    assert "no browser was found; --no-open prints the link for one" in said


def test_what_a_killed_connect_left_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pam_client.browser.show", lambda url: False)
    home = Home(tmp_path / "home")
    with opened(home, "s-old", "http://a.b.localhost:1/.pam/enter?t=x") as found:
        assert not found
        old = home.folder / "open" / "s-old.html"
        before = time.time() - 90000
        os.utime(old, (before, before))
        with opened(home, "s-new", "http://a.b.localhost:1/.pam/enter?t=y"):
            assert not old.exists()
            assert (home.folder / "open" / "s-new.html").exists()
    assert list((home.folder / "open").iterdir()) == []


def test_what_is_no_http_opens_no_channel(app: Any, stay: Any) -> None:
    process, line = stay("--no-open")
    port = int(re.findall(r":(\d+)/", line)[0])
    with socket.create_connection(("127.0.0.1", port), timeout=60) as program:
        program.sendall(bytes.fromhex("160301020001"))  # TLS: https:// instead of http://
        with contextlib.suppress(ConnectionResetError):
            assert program.recv(100) == b""
    assert "what is not a web connection" in end(process)[2]
    assert app.grants == []


@pytest.mark.parametrize("where", ["relay", "agent"])
def test_a_refusal_is_a_page(app: Any, stay: Any, where: str) -> None:
    if where == "relay":
        app.refuse_channels = "no <b>agent</b>"
    else:
        app.refuse_grant = "the <b>user</b> is disabled"
    process, line = stay("--no-open")
    head, body = ask("127.0.0.1", int(re.findall(r":(\d+)/", line)[0]))
    assert head.startswith(b"HTTP/1.1 502 Bad Gateway\r\n")
    assert (b"&lt;b&gt;agent&lt;/b&gt;" if where == "relay" else b"&lt;b&gt;user&lt;/b&gt;") in body
    assert b"<b>" not in body
    end(process)


# -- connect, for a program ------------------------------------------------------------------------------


def test_a_command_finds_the_address(app: Any, run: Any) -> None:
    words = ("connect", "grafana/viewer", "--", sys.executable, "-c", FETCH)
    proxies = {"http_proxy": "http://127.0.0.1:9", "NO_PROXY": "corp.example"}
    done = run(*words, **proxies)
    assert done.returncode == 0, done.stderr
    answer, names = done.stdout.splitlines()
    said = json.loads(json.loads(answer)["line"])
    assert said["mode"] == "program"
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+", said["origin"])
    assert "key" not in said
    assert f"Host: {said['origin'].removeprefix('http://')}" in json.loads(answer)["request"]
    assert names == "corp.example,127.0.0.1,localhost corp.example,127.0.0.1,localhost"
    assert app.ended == app.sessions


def test_a_command_may_choose_the_port(app: Any, run: Any) -> None:
    port = free_port()
    done = run("connect", "grafana/viewer", "--port", str(port), "--", "sh", "-c", "echo $PAM_URL")
    assert done.stdout.strip() == f"http://127.0.0.1:{port}"


def test_what_makes_no_sense_is_refused(app: Any, call: Any) -> None:
    done = call("connect", "grafana/viewer", "--no-open", "--", "true")
    assert done.returncode == 2
    assert "a COMMAND opens no browser" in done.stderr
    done = call("connect", "grafana/viewer", "--socket", "/nowhere/there")
    assert done.returncode == 1
    assert "cannot be brought to a UNIX socket" in done.stderr
    app.protocol = "postgres"
    done = call("connect", "prod-db/readonly", "--no-open")
    assert done.returncode == 2
    assert "prod-db/readonly is not a web application" in done.stderr
    assert app.ended == app.sessions


# -- where it listens ------------------------------------------------------------------------------------


def listening(home: Home, wish: place.Wish) -> Any:
    session: Any = SimpleNamespace(account="grafana/viewer", user="me", database=None, gateway="dc1")
    return place.listening(home, "https://pam.test", session, HTTP, wish)


def test_elsewhere_a_browser_shows_its_cookie_and_a_program_could_show_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(place, "has_peer_check", lambda: False)  # as on macOS
    home = Home(tmp_path / "home")
    with listening(home, place.Wish()) as (sockets, at):
        assert at.origin is not None
        assert at.origin.key
        for sock in sockets:
            sock.close()
    with pytest.raises(PamError, match="other users could use it"):
        listening(home, place.Wish(command=True)).__enter__()


def test_a_port_of_which_another_has_one_half_is_not_ours() -> None:
    """Who listened on ::1 would be taken for us by a browser, and get its cookies and our link."""
    with socket.socket(socket.AF_INET6) as other:
        other.bind(("::1", free_port()))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(PamError, match=re.escape(f"cannot listen on [::1]:{port}")):
            ports.listen_on_both(port)
        with socket.create_server(("127.0.0.1", port)):  # nothing of ours is left on the other half
            pass


@pytest.mark.parametrize("number", [errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT])
def test_a_machine_without_ipv6_has_one_half_only(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    real = ports._listen

    def listen(family: socket.AddressFamily, host: str, port: int) -> socket.socket:
        if family == socket.AF_INET6:
            raise OSError(number, "no IPv6")
        return real(family, host, port)

    monkeypatch.setattr(ports, "_listen", listen)
    (only,) = ports.listen_on_both(0)
    only.close()


# -- refusals, and the first bytes -------------------------------------------------------------------------


def split(data: bytes, cuts: list[int]) -> Iterator[bytes]:
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    return (data[begin:end] for begin, end in itertools.pairwise(edges))


@given(
    message=st.text(max_size=300), hint=st.text(max_size=300), cuts=st.lists(st.integers(0, 40), max_size=5)
)
def test_a_refusal_is_one_complete_answer_however_the_request_comes(
    message: str, hint: str, cuts: list[int]
) -> None:
    message, hint = (text.encode(errors="replace").decode() for text in (message, hint))
    refusal = HttpRefusal(message, hint)
    answers = [refusal.feed(piece) for piece in split(GET, cuts)]
    assert refusal.done
    head, _, body = b"".join(answers).partition(b"\r\n\r\n")
    assert f"Content-Length: {len(body)}".encode() in head.split(b"\r\n")
    assert b"Connection: close" in head
    text = html.unescape(body.decode())
    assert message in text
    assert hint in text
    assert body.count(b"<script") == 0
    assert refusal.feed(b"more") == b""


def test_a_refusal_of_a_head_request_has_no_body() -> None:
    refusal = HttpRefusal("no")
    answer = refusal.feed(b"HEAD / HTTP/1.1\r\n\r\n")
    assert answer.endswith(b"\r\n\r\n")
    assert b"Content-Length: 0" not in answer


def test_a_head_without_end_is_answered_all_the_same() -> None:
    refusal = HttpRefusal("no")
    assert refusal.feed(b"GET / HTTP/1.1\r\nX: ") == b""
    assert refusal.feed(b"x" * MAX_HEAD).startswith(b"HTTP/1.1 502 ")
    assert refusal.done


@pytest.mark.parametrize("method", ["GET", "PUT", "POST", "HEAD", "PATCH", "DELETE", "OPTIONS", "PROPFIND"])
def test_methods_begin_http(method: str) -> None:
    assert starts_http(f"{method} / HTTP/1.1".encode()[: HTTP.head])


@pytest.mark.parametrize("head", [b"\x16\x03\x01\x02", b"SSH-", b"get ", b"\0\0\0\x08", b"GET\n", b"\r\nGE"])
def test_nothing_else_begins_http(head: bytes) -> None:
    assert not starts_http(head)


def test_an_answer_of_the_whole_way_is_seen_by_a_real_http_client(app: Any, stay: Any) -> None:
    app.refuse_channels = "no agent"
    _, line = stay("--no-open")
    port = int(re.findall(r":(\d+)/", line)[0])
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=60)
    assert refused.value.code == 502
    refused.value.close()
