"""Other pages, names, users and broken requests: none of them uses a listener for a web application."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from chromium import Opened
from playwright.sync_api import Browser, BrowserContext
from processes import family, wait_for
from stack import Person, Stack
from web_servers import WebServers

OTHER_UID = 65534

#: Everything that a page can do to another origin; says when it has done it.
EVIL = """<!doctype html><html><head><title>evil</title></head><body><script>
async function attack(target) {
  const tries = [
    () => fetch(target + "/evil-simple", {credentials: "include"}),
    () => fetch(target + "/evil-opaque", {credentials: "include", mode: "no-cors"}),
    () => fetch(target + "/evil-post",
      {method: "POST", body: "a=1", credentials: "include", mode: "no-cors"}),
    () => fetch(target + "/evil-json", {method: "PUT", credentials: "include", headers: {"X-A": "1"}}),
    () => new Promise((done) => {
      const image = new Image(); image.onload = () => done("loaded"); image.onerror = () => done("no");
      image.src = target + "/pixel.svg?evil"; }),
    () => new Promise((done) => {
      const script = document.createElement("script"); script.onload = () => done("loaded");
      script.onerror = () => done("no"); script.src = target + "/evil-script";
      document.head.append(script); }),
    () => new Promise((done) => {
      const socket = new WebSocket(target.replace("http:", "ws:") + "/ws?evil");
      socket.onopen = () => done("open"); socket.onclose = () => done("no"); }),
    () => new Promise((done) => {
      const frame = document.createElement("iframe"); frame.onload = () => done("framed");
      frame.src = target + "/evil-frame"; document.body.append(frame); }),
  ];
  const results = [];
  for (const attempt of tries) {
    try { const got = await attempt(); results.push(typeof got === "string" ? got : got.status); }
    catch (error) { results.push("no"); }
  }
  return results;
}
function post(target) {
  const form = document.createElement("form");
  form.method = "post"; form.action = target + "/note";
  const input = document.createElement("input"); input.name = "text"; input.value = "evil";
  form.append(input); document.body.append(form); form.submit();
}
</script></body></html>"""


class EvilPage(BaseHTTPRequestHandler):
    def log_message(self, *_: object) -> None: ...

    def do_GET(self) -> None:
        body = EVIL.encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture(scope="module")
def evil() -> Iterator[str]:
    """Another site, at home on this machine: ``http://evil.test:PORT``."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), EvilPage)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://evil.test:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join(10)


@pytest.mark.parametrize("site", ["evil.test", "evil.localhost"])
def test_a_page_of_another_origin_cannot_use_the_listener(
    opened: Callable[..., Opened], context: BrowserContext, web_servers: WebServers, evil: str, site: str
) -> None:
    """Abuse case 14. The second site is a sibling below localhost: "same-site", and no more trusted."""
    one = opened("echo/anyone")
    one.enter(context)
    before = len(web_servers.seen())

    def asked() -> set[str]:
        """Since then, but for what the page that was entered may load late."""
        late = {"/style.css", "/pixel.svg", "/favicon.ico"}
        return {path for _, path, _ in web_servers.seen()[before:]} - late

    page = context.new_page()
    page.goto(evil.replace("evil.test", site))
    results = page.evaluate("target => attack(target)", one.url)
    assert results[0] == results[3] == results[4] == results[5] == results[6] == "no"
    assert "/evil" not in json.dumps(web_servers.seen()[before:])
    with page.expect_navigation():
        page.evaluate("target => post(target)", one.url)
    assert page.title() == "403 Forbidden"
    assert asked() == set()
    # A link that is followed leads to a page of ours, and on if the person says so.
    page.goto(evil.replace("evil.test", site))
    with page.expect_navigation():
        page.evaluate("target => { location.href = target + '/?followed' }", one.url)
    assert asked() == set()
    with page.expect_navigation():
        page.click("text=Continue")
    assert asked() == {"/?followed"}


def test_a_name_that_was_rebound_cannot_use_the_listener(
    opened: Callable[..., Opened], context: BrowserContext, web_servers: WebServers
) -> None:
    """Abuse case 14: the page's own name leads to this machine meanwhile, so all of it is same-origin."""
    one = opened("echo/anyone")
    one.enter(context)
    before = web_servers.seen()
    page = context.new_page()
    for name in ("rebound.test", "localhost", "127.0.0.1", "other.echo.localhost"):
        answer = page.goto(f"http://{name}:{one.port}/")
        assert answer is not None
        assert (name, answer.status) == (name, 403)
        assert "the request is for another host" in page.inner_text("body")
    assert web_servers.seen() == before


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can start a process of another user")
@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_another_user_of_the_machine_cannot_use_it(
    opened: Callable[..., Opened], context: BrowserContext, web_servers: WebServers, host: str
) -> None:
    """Not even with what lets the browser in."""
    one = opened("echo/anyone")
    link = one.link
    one.enter(context)
    (cookie,) = context.cookies()
    assert cookie["httpOnly"]
    assert cookie["sameSite"] == "Strict"
    before = web_servers.seen()
    script = (
        "import os, socket, sys; os.setuid(int(sys.argv[1]))\n"
        "s = socket.socket(socket.AF_INET6 if ':' in sys.argv[2] else socket.AF_INET); s.settimeout(30)\n"
        "s.connect((sys.argv[2], int(sys.argv[3])))\n"
        "s.sendall(sys.stdin.buffer.read()); print(s.recv(100))"
    )
    for path in ("/", link.removeprefix(one.url)):
        shown = f"{cookie['name']}={cookie['value']}"
        head = f"GET {path} HTTP/1.1\r\nHost: {one.url[7:]}\r\nCookie: {shown}\r\n\r\n"
        done = subprocess.run(
            [sys.executable, "-c", script, str(OTHER_UID), host, str(one.port)],
            input=head.encode(),
            capture_output=True,
            timeout=60,
            check=False,
        )
        assert b"HTTP/1.1" not in done.stdout
        assert b"b''" in done.stdout or b"ConnectionResetError" in done.stderr or b"BrokenPipe" in done.stderr
    assert web_servers.seen() == before
    assert "not of this user" in one.stop()[1]


#: Requests that two readers could take for different ones (RFC 9112, 11.2), or that ask for too much.
_POST = "POST /note HTTP/1.1\r\nHost: {host}\r\n"
SMUGGLED = {
    "both lengths": _POST + "Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "two lengths": _POST + "Content-Length: 4\r\nContent-Length: 5\r\n\r\nabcd",
    "a signed length": _POST + "Content-Length: +4\r\n\r\nabcd",
    "folding": "GET / HTTP/1.1\r\nHost: {host}\r\nX-A: 1\r\n X-B: 2\r\n\r\n",
    "a space before the colon": "GET / HTTP/1.1\r\nHost: {host}\r\nTransfer-Encoding : chunked\r\n\r\n",
    "an unknown coding": _POST + "Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "a bad chunk": _POST + "Transfer-Encoding: chunked\r\n\r\n0x3\r\nabc\r\n0\r\n\r\n",
    "a bare line feed": "GET / HTTP/1.1\nHost: {host}\n\n",
    "two hosts": "GET / HTTP/1.1\r\nHost: {host}\r\nHost: other\r\n\r\n",
    "no host": "GET / HTTP/1.1\r\n\r\n",
    "an absolute address": "GET http://127.0.0.1:1/ HTTP/1.1\r\nHost: {host}\r\n\r\n",
    "a tunnel": "CONNECT 127.0.0.1:22 HTTP/1.1\r\nHost: {host}\r\n\r\n",
    "an endless head": "GET / HTTP/1.1\r\nHost: {host}\r\nX-A: " + "x" * 200_000,
}


def test_requests_that_two_readers_could_take_for_different_ones(
    web_alice: Person, web_servers: WebServers, tmp_path: Path
) -> None:
    requests = tmp_path / "requests.json"
    requests.write_text(json.dumps(SMUGGLED))
    script = """
import json, os, socket, sys
host = os.environ["PAM_URL"].removeprefix("http://")
name, _, port = host.partition(":")
answers = {}
for what, request in json.load(open(sys.argv[1])).items():
    with socket.create_connection((name, int(port)), timeout=60) as program:
        heard = b""
        try:
            program.sendall(request.replace("{host}", host).encode())
            program.shutdown(socket.SHUT_WR)
            while data := program.recv(65536):
                heard += data
        except OSError:
            pass
    answers[what] = heard.decode("latin-1")
print(json.dumps(answers))
"""
    before = web_servers.seen()
    done = web_alice.run("connect", "echo/token", "--", sys.executable, "-c", script, str(requests))
    for what, answer in json.loads(done.stdout).items():
        assert re.match(r"HTTP/1\.1 4\d\d |$", answer), (what, answer[:200])
        assert answer.count("HTTP/1.1") <= 1, what
    assert web_servers.seen() == before


def test_what_lets_the_browser_in_is_nowhere_to_be_read(
    opened: Callable[..., Opened], browser: Browser, context: BrowserContext, web_stack: Stack
) -> None:
    """Not in an argument, an environment or a log; what the app got is tested with the cookies."""
    one = opened("echo/anyone")
    ticket = one.link.partition("t=")[2]
    one.enter(context)
    (cookie,) = (found["value"] for found in context.cookies() if found["name"].startswith("__pam-"))
    shown = b""
    for pid in family(one.process.pid):
        for what in ("cmdline", "environ"):
            with contextlib.suppress(OSError):  # what it started may end meanwhile
                shown += Path(f"/proc/{pid}/{what}").read_bytes()
    assert b"echo/anyone" in shown
    assert b"PAM_CLIENT_HOME" in shown
    for process in web_stack.processes.values():
        shown += process.log.read_bytes()
    shown += one.stop()[1].encode()
    for secret in (ticket, cookie):
        assert secret.encode() not in shown


def test_after_the_end_nothing_listens(opened: Callable[..., Opened], context: BrowserContext) -> None:
    one = opened("echo/anyone")
    one.enter(context)
    one.stop()

    def refused() -> bool:
        with socket.socket() as program:
            return program.connect_ex(("127.0.0.1", one.port)) != 0

    wait_for(refused, "the end of the listener")
