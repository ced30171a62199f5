"""JupyterLab, as people use it: a large application on WebSockets, behind a token that nobody sees."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from chromium import Opened
from playwright.sync_api import BrowserContext, expect
from processes import wait_for
from stack import Person
from web_servers import WebServers


@pytest.fixture(scope="module")
def web_servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebServers]:
    made = WebServers(tmp_path_factory.mktemp("servers") / "web", lab=True)
    yield made
    made.stop()


def test_a_notebook_and_a_terminal(
    opened: Callable[..., Opened],
    context: BrowserContext,
    web_servers: WebServers,
    web_alice: Person,
    replay: Callable[..., list[dict[str, Any]]],
) -> None:
    one = opened("lab/student")
    one.enter(context)
    page = context.new_page()
    page.goto(f"{one.url}/lab")
    page.locator(".jp-LauncherCard[data-category=Notebook]").first.click()
    expect(page.get_by_text("Python 3 (ipykernel) | Idle")).to_be_visible()
    page.locator(".jp-Notebook .cm-content").first.click()
    page.keyboard.type("print(6 * 7, 'from the kernel')")
    page.keyboard.press("Shift+Enter")
    expect(page.locator(".jp-OutputArea-output").first).to_have_text("42 from the kernel")
    page.locator("[data-command='launcher:create']").first.click()
    page.locator(".jp-LauncherCard", has_text="Terminal").last.click()
    terminal = page.locator(".jp-Terminal textarea").last
    expect(terminal).to_be_attached()
    terminal.focus()
    proof = web_servers.lab_folder / "proof"

    def answered() -> bool:
        # More than once: the shell behind it may not read yet.
        page.keyboard.type(f"echo $((6*7)) from the shell > {proof}\n")
        page.wait_for_timeout(500)
        return proof.exists() and proof.read_text() == "42 from the shell\n"

    wait_for(answered, "the shell's answer")
    session = web_alice.newest()
    one.stop()
    events = replay(web_alice, session)
    messages = b"".join(
        base64.b64decode(event.get("base64", "")) for event in events if event["kind"] == "ws"
    )
    assert b"42 from the kernel" in messages
    assert any(event["kind"] == "ws" and '["stdin"' in event.get("data", "") for event in events)
    assert web_servers.passwords["student"] not in json.dumps(events)
    assert web_servers.passwords["student"].encode() not in messages
