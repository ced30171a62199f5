"""A gigabyte each way through a web account, by a program and by a browser, with flat memory."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from chromium import Opened
from playwright.sync_api import BrowserContext
from processes import resident
from stack import Person, Stack
from web_app import PIECE

pytestmark = pytest.mark.timeout(1800)

SIZE = int(os.environ.get("PAM_TEST_WEB_MIB", "1024")) << 20
#: What any part may grow by while it carries them: queues and windows, and what Python keeps of freed memory.
GROWTH = 48 << 20


class Growth:
    """The resident memory of some processes, and how far above its beginning any of them ever was."""

    def __init__(self, *pids: int) -> None:
        self._first = {pid: resident(pid) for pid in pids}
        self.most = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Growth:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join(30)

    def _run(self) -> None:
        while not self._done.wait(0.1):
            self.most = max(self.most, *(resident(pid) - first for pid, first in self._first.items()))


def digest_of_pieces() -> str:
    digest = hashlib.sha256()
    for _ in range(SIZE // len(PIECE)):
        digest.update(PIECE)
    return digest.hexdigest()


#: Downloads and uploads by PAM_URL; prints sizes, hashes, and by how much its own parent, the client, grew.
TRANSFER = """
import hashlib, http.client, json, os, sys, threading, time
host, size, piece = os.environ["PAM_URL"].removeprefix("http://"), int(sys.argv[1]), bytes(range(256)) * 256
def resident():
    return int(open(f"/proc/{os.getppid()}/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
def ask(*request):
    link = http.client.HTTPConnection(host, timeout=120)
    link.request(*request)
    return link.getresponse()
ask("GET", "/bytes/1000000").read()
first, most, done = resident(), 0, threading.Event()
def watch():
    global most
    while not done.wait(0.1):
        most = max(most, resident() - first)
threading.Thread(target=watch, daemon=True).start()
began = time.monotonic()
answer, digest, got = ask("GET", f"/bytes/{size}"), hashlib.sha256(), 0
while data := answer.read(1 << 16):
    digest.update(data); got += len(data)
down = time.monotonic() - began
body = (piece for _ in range(size // len(piece)))
up = ask("POST", "/upload", body, {"Content-Length": str(size // len(piece) * len(piece))})
said = json.loads(up.read())
done.set()
print(json.dumps({"got": got, "sha256": digest.hexdigest(), "up": said, "grown": most,
    "seconds": [round(down, 2), round(time.monotonic() - began - down, 2)]}))
"""


def test_large_bodies_go_both_ways_with_flat_memory(web_stack: Stack, web_alice: Person) -> None:
    # Once before, so that what is only made at first is there.
    web_alice.run("connect", "files/reader", "--", sys.executable, "-c", TRANSFER, str(1 << 20))
    with Growth(*(web_stack.processes[name].pid for name in ("relay", "dc1-a"))) as growth:
        done = web_alice.run(
            "connect", "files/reader", "--", sys.executable, "-c", TRANSFER, str(SIZE), timeout=1500
        )
    said = json.loads(done.stdout)
    assert said["got"] == said["up"]["bytes"] == SIZE
    assert said["sha256"] == said["up"]["sha256"] == digest_of_pieces()
    print(f"{SIZE >> 20} MiB down and up in {said['seconds']} s; grown: {growth.most >> 20} MiB at most,")
    print(f"the client {said['grown'] >> 20} MiB")
    assert growth.most < GROWTH
    assert said["grown"] < GROWTH


def test_a_browser_downloads_and_uploads_a_large_file(
    opened: Callable[..., Opened], context: BrowserContext, web_stack: Stack, tmp_path: Path
) -> None:
    one = opened("files/reader")
    one.enter(context)
    page = context.new_page()
    page.set_default_timeout(1_500_000)
    page.goto(one.url)
    parts = [web_stack.processes[name].pid for name in ("relay", "dc1-a")]
    with Growth(*parts, one.process.pid) as growth:
        with page.expect_download(timeout=1_500_000) as download:
            page.evaluate(
                """(size) => { const link = document.createElement("a"); link.download = "large";
                link.href = `/bytes/${size}`; document.body.append(link); link.click(); }""",
                SIZE,
            )
        file = tmp_path / "large"
        download.value.save_as(file)
        with file.open("rb") as got:
            assert hashlib.file_digest(got, "sha256").hexdigest() == digest_of_pieces()
        page.evaluate("document.body.innerHTML = '<input type=file>'")
        page.set_input_files("input", file)
        said = page.evaluate(
            """async () => { const body = document.querySelector("input").files[0];
            return await (await fetch("/upload", {method: "POST", body})).json(); }"""
        )
        file.unlink()
    assert said == {"bytes": SIZE, "sha256": digest_of_pieces()}
    print(f"{SIZE >> 20} MiB down and up by a browser; grown: {growth.most >> 20} MiB at most")
    assert growth.most < GROWTH
