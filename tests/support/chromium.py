"""Debian's Chromium under Playwright: fresh profile, loopback only."""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

from playwright.sync_api import Browser, BrowserContext, expect, sync_playwright
from processes import wait_for
from stack import Person

CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"
#: Other sites, at home on this machine; every name but these leads nowhere.
OTHER_SITES = ("evil.test", "rebound.test")
#: For whatever a page is waited for: Playwright's own five seconds are little on a machine under load.
PATIENCE_MS = 120_000
expect.set_options(timeout=PATIENCE_MS)
_RULES = ", ".join(
    [
        *(f"MAP {name} 127.0.0.1" for name in OTHER_SITES),
        "MAP * ~NOTFOUND, EXCLUDE localhost, EXCLUDE *.localhost, EXCLUDE 127.0.0.1",
    ]
)
_ARGUMENTS = (
    *("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"),
    *("--disable-component-update", "--disable-default-apps", "--disable-sync", "--disable-dev-shm-usage"),
    f"--host-resolver-rules={_RULES}",
)


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    """A browser; every context of it is a profile of its own."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(_ARGUMENTS))
        try:
            yield browser
        finally:
            browser.close()


class Opened:
    """A running ``pam-client connect`` of a web application, opened as a person would have it."""

    def __init__(self, person: Person, account: str, folder: Path, *options: str) -> None:
        folder.mkdir(parents=True)
        self._called = folder / "called"
        script = folder / "browser"
        script.write_text(f'#!/bin/sh\nprintf "%s" "$1" > {folder}/part && mv {folder}/part {self._called}\n')
        script.chmod(0o700)
        self.process = subprocess.Popen(
            person.command("connect", account, *options),
            env={**person.environment(), "BROWSER": str(script)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            text=True,
        )
        timer = threading.Timer(120, self.process.kill)
        timer.start()
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().strip().rstrip("/")
        timer.cancel()
        if not self.url:
            raise RuntimeError(f"connect ended\n{self.process.communicate()[1]}\n{person.stack.logs()}")

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    @property
    def file(self) -> str:
        """The ``file://`` address that the browser was called with."""
        wait_for(self._called.exists, "the call of the browser", timeout=60)
        return self._called.read_text()

    @property
    def link(self) -> str:
        found = re.search(r'href="([^"]+)"', Path(self.file.removeprefix("file://")).read_text())
        assert found
        return found[1]

    def stop(self) -> tuple[int, str]:
        """Ctrl-C; the exit code and what was said."""
        if self.process.poll() is None:
            self.process.terminate()
        return self.ended()

    def ended(self) -> tuple[int, str]:
        """The same once it ends by itself."""
        _, said = self.process.communicate(timeout=60)
        return self.process.returncode, said

    def enter(self, context: BrowserContext) -> None:
        """Let the browser of ``context`` in, as the file leads it."""
        page = context.new_page()
        page.goto(self.file)
        page.wait_for_url(f"{self.url}/**", timeout=PATIENCE_MS)
        page.wait_for_load_state()
        page.wait_for_function("!location.pathname.startsWith('/.pam')", timeout=PATIENCE_MS)
        page.wait_for_load_state()  # of that page, with its images: no request of it comes later
        page.close()
