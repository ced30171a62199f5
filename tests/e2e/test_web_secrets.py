"""The credentials of web applications stay in the agent, as does what an application gives it for them."""

from __future__ import annotations

import sqlite3
import sys
from collections.abc import Callable

from chromium import Opened
from memory import Watch, clients, contained, forms, in_arguments, in_files, in_memory
from playwright.sync_api import BrowserContext
from processes import family, wait_for
from stack import Person, Stack
from web_servers import WebServers

#: No page that shows the request's own headers: it would show the credential.
ASK = "import os, urllib.request as r; print(len(r.urlopen(os.environ['PAM_URL'] + '/bytes/4096').read()))"


def app_sessions(servers: WebServers) -> list[str]:
    """The values of the cookies by which Django knows its logins; the agent's are among them."""
    with sqlite3.connect(servers.folder / "admin.sqlite3", timeout=30) as database:
        return [row[0] for row in database.execute("select session_key from django_session")]


def test_no_credential_and_no_cookie_of_the_app_leaves_the_agent(
    opened: Callable[..., Opened],
    context: BrowserContext,
    web_servers: WebServers,
    web_stack: Stack,
    web_alice: Person,
) -> None:
    needles = {}
    for name in ("keeper", "reader", "token"):
        needles |= forms(name, web_servers.passwords[name])
    relay, agent = (web_stack.processes[name].pid for name in ("relay", "dc1-a"))
    looks = {
        "relay": lambda: in_memory(relay, needles),
        "clients": lambda: {name for pid in clients(web_alice.home) for name in in_memory(pid, needles)},
        "arguments": lambda: in_arguments(needles),
        "files": lambda: in_files(web_stack.folder, needles),
    }
    with Watch(looks, pause=0.7) as watch:
        one = opened("django/keeper")
        one.enter(context)
        page = context.new_page()
        page.goto(f"{one.url}/auth/group/add/")
        page.fill("#id_name", "watched")
        page.click("input[name=_save]")
        page.wait_for_selector(".messagelist")
        for account in ("files/reader", "echo/token"):
            done = web_alice.run("-vv", "connect", account, "--", sys.executable, "-c", ASK)
            assert not contained((done.stdout + done.stderr).encode(), needles)
        # The same look finds it where it must be.
        assert "keeper raw" in in_memory(agent, needles)
        cookies = {}
        for number, value in enumerate(app_sessions(web_servers)):
            cookies |= forms(f"cookie {number}", value)
        assert in_memory(agent, cookies)
        for pid in {relay, one.process.pid, *family(one.process.pid)}:
            assert in_memory(pid, cookies) == set()
        wait_for(lambda: watch.rounds >= 3, "looks at a session that works", timeout=180)
    assert watch.found == {}
    said = one.stop()[1]
    assert not contained(said.encode(), needles | cookies)
    assert in_files(web_stack.folder, cookies) == {}
