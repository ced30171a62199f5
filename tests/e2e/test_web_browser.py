"""Web applications in a real Chromium: logged in without a password, working, recorded, kept apart."""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Callable
from pathlib import Path

from chromium import PATIENCE_MS, Opened
from playwright.sync_api import Browser, BrowserContext, expect
from processes import wait_for
from stack import Person
from web_servers import WebServers


def test_django_admin_is_logged_in_and_its_forms_work(
    opened: Callable[..., Opened], context: BrowserContext, web_servers: WebServers
) -> None:
    one = opened("django/keeper")
    assert re.fullmatch(r"http://keeper\.django\.localhost:\d+", one.url)
    one.enter(context)
    page = context.new_page()
    page.goto(one.url)
    expect(page).to_have_title(re.compile("Site administration"))
    assert page.evaluate("getComputedStyle(document.querySelector('#header')).backgroundColor") not in (
        "",
        "rgba(0, 0, 0, 0)",
    ), "the style sheets came"
    page.goto(f"{one.url}/auth/group/add/")
    page.fill("#id_name", "editors")
    page.click("input[name=_save]")
    expect(page.locator(".messagelist")).to_contain_text("was added successfully")
    assert {cookie["name"] for cookie in context.cookies()} == {f"__pam-{one.port}"}, (
        "the app's cookies stay in the agent"
    )


def test_the_login_is_renewed_when_the_app_forgets_it(
    opened: Callable[..., Opened], context: BrowserContext, web_servers: WebServers
) -> None:
    one = opened("django/keeper")
    one.enter(context)
    page = context.new_page()
    page.goto(one.url)
    expect(page).to_have_title(re.compile("Site administration"))
    with sqlite3.connect(web_servers.folder / "admin.sqlite3", timeout=30) as database:
        database.execute("delete from django_session")

    def logged_in() -> bool:
        # The agent logs in again at most so often.
        page.goto(one.url)
        return "Site administration" in page.title()

    wait_for(logged_in, "the new login", timeout=120)


def test_pages_assets_and_forms_behind_basic_authentication(
    opened: Callable[..., Opened], context: BrowserContext
) -> None:
    one = opened("files/reader")
    one.enter(context)
    page = context.new_page()
    page.goto(one.url)
    assert page.evaluate("getComputedStyle(document.querySelector('h1')).color") == "rgb(1, 2, 3)"
    assert page.evaluate("document.querySelector('img').naturalWidth") == 3
    page.fill("input[name=text]", "two words & more")
    page.click("button")
    expect(page.locator("h1")).to_have_text("noted two words & more")


def test_sockets_and_server_sent_events(opened: Callable[..., Opened], context: BrowserContext) -> None:
    one = opened("echo/anyone")
    one.enter(context)
    page = context.new_page()
    page.goto(f"{one.url}/socket")
    page.wait_for_function("window.opened")
    for number in range(20):
        page.evaluate(f"window.say('message {number}')")
    page.evaluate("window.say('x'.repeat(300000))")
    page.wait_for_function("window.heard.length == 21")
    assert page.evaluate("window.heard[19]") == "message 19"
    assert page.evaluate("window.heard[20].length") == 300000
    assert page.evaluate("window.ended") is None
    page.evaluate(
        """() => { window.got = []; window.source = new EventSource("/events");
        window.source.onmessage = (event) => window.got.push(event.data); }"""
    )
    page.wait_for_function("window.got.length >= 3")
    page.evaluate("window.source.close()")


def test_two_apps_side_by_side_share_nothing(opened: Callable[..., Opened], context: BrowserContext) -> None:
    first, second = opened("files/reader"), opened("echo/anyone")
    for one in (first, second):
        one.enter(context)
        page = context.new_page()
        page.goto(f"{one.url}/cookie/theme/dark")
        page.goto(one.url)
        page.evaluate(f"localStorage.setItem('mine', '{one.url}')")
    for one in (first, second):
        page = context.new_page()
        page.goto(one.url)
        assert page.evaluate("document.cookie") == "theme=dark"
        assert page.evaluate("localStorage.getItem('mine')") == one.url
        page.goto(f"{one.url}/cookie/only/{one.port}")
        page.goto(f"{one.url}/headers")
        sent = {name.lower(): value for name, value in json.loads(page.inner_text("body"))}
        assert sent["cookie"] == f"theme=dark; only={one.port}", "and not the one that lets the browser in"


def test_the_link_works_once_and_nobody_else_gets_in(
    opened: Callable[..., Opened], browser: Browser, context: BrowserContext, web_servers: WebServers
) -> None:
    one = opened("echo/anyone")
    link = one.link
    one.enter(context)
    stranger = browser.new_context()
    stranger.set_default_timeout(PATIENCE_MS)
    try:
        page = stranger.new_page()
        before = web_servers.seen()
        answer = page.goto(link)
        assert answer is not None
        assert answer.status == 403
        assert "this link was used already" in page.inner_text("body")
        answer = page.goto(one.url)
        assert answer is not None
        assert answer.status == 403
        assert "pam-client connect" in page.inner_text("body")
        assert web_servers.seen() == before
    finally:
        stranger.close()
    page = context.new_page()
    page.goto(one.url)
    expect(page).to_have_title("the app")


def test_identity_headers_are_the_agents(opened: Callable[..., Opened], context: BrowserContext) -> None:
    one = opened("echo/anyone")
    one.enter(context)
    page = context.new_page()
    page.set_extra_http_headers({"X-Remote-User": "root", "X-Session": "forged"})
    page.goto(f"{one.url}/headers")
    sent = {name.lower(): value for name, value in json.loads(page.inner_text("body"))}
    assert sent["x-remote-user"] == "alice"
    assert sent["x-session"].startswith("s-")


def test_a_rule_refuses_with_a_page_that_names_it(
    opened: Callable[..., Opened], context: BrowserContext, web_servers: WebServers
) -> None:
    one = opened("files/guarded")
    one.enter(context)
    page = context.new_page()
    before = len(web_servers.seen())
    page.goto(one.url)
    for path in ("/headers", "/%68eaders", "/Headers", "//headers/", "/x%2f..%2fheaders"):
        status = page.evaluate("path => fetch(location.origin + path).then((answer) => answer.status)", path)
        assert (path, status) == (path, 400 if "%2f" in path else 403)
    answer = page.goto(f"{one.url}/headers")
    assert answer is not None
    assert answer.status == 403
    assert "/headers/**" in page.inner_text("body")
    page.goto(one.url)
    page.click("button")
    expect(page.locator("h1")).to_contain_text("403")
    assert "GET, HEAD" in page.inner_text("body") or "no allow rule" in page.inner_text("body")
    assert [path for _, path, _ in web_servers.seen()[before:] if path in ("/headers", "/note")] == []


def test_a_command_gets_a_base_url(web_alice: Person, web_servers: WebServers) -> None:
    done = web_alice.run(
        "connect",
        "echo/token",
        "--",
        "sh",
        "-c",
        'curl -s "$PAM_URL/headers"; tr "\\0" "\\n" </proc/$$/environ',
    )
    headers, _, environment = done.stdout.partition("]]")
    sent = {name.lower(): value for name, value in json.loads(headers + "]]")}
    assert sent["authorization"] == f"Bearer {web_servers.passwords['token']}"
    assert "PAM_URL=http://127.0.0.1:" in environment
    assert web_servers.passwords["token"] not in environment


def test_a_killed_session_shows_why(
    opened: Callable[..., Opened], context: BrowserContext, web_alice: Person, web_servers: WebServers
) -> None:
    one = opened("echo/anyone")
    one.enter(context)
    page = context.new_page()
    page.goto(one.url)
    session = web_alice.newest()
    page.evaluate(
        "() => { window.answer = fetch('/sleep/60').then(async (r) => [r.status, await r.text()]); }"
    )
    wait_for(lambda: ["GET", "/sleep/60", ""] in web_servers.seen(), "the request")
    web_alice.run("sessions", "kill", session, "--reason", "left the desk")
    status, text = page.evaluate("window.answer")
    assert status in (403, 502)
    assert "killed by alice: left the desk" in text
    code, said = one.ended()
    assert code == 3
    assert "left the desk" in said


def test_the_recording_is_listed_verified_and_exported(
    opened: Callable[..., Opened],
    browser: Browser,
    context: BrowserContext,
    web_alice: Person,
    web_servers: WebServers,
    tmp_path: Path,
) -> None:
    one = opened("django/keeper")
    one.enter(context)
    page = context.new_page()
    page.goto(f"{one.url}/auth/user/")
    expect(page).to_have_title(re.compile("Select user"))
    one.stop()
    (entry, *_) = json.loads(web_alice.run("sessions", "ls", "--json").stdout)
    assert entry["account"] == "django/keeper"

    def verified() -> bool:
        return web_alice.run("replay", entry["id"], check=False).returncode == 0

    wait_for(verified, "the verified recording", timeout=120)
    file = tmp_path / "session.har"
    done = web_alice.run("replay", entry["id"], "--export", "har", "-o", str(file))
    assert "the recording is verified" in done.stdout + done.stderr
    text = file.read_text()
    entries = json.loads(text)["log"]["entries"]
    asked = {(one["request"]["method"], one["request"]["url"], one["response"]["status"]) for one in entries}
    assert ("GET", "https://admin.corp.test/auth/user/", 200) in asked
    with sqlite3.connect(web_servers.folder / "admin.sqlite3", timeout=30) as database:
        cookies = [key for (key,) in database.execute("select session_key from django_session")]
    assert cookies
    for secret in (web_servers.passwords["keeper"], *cookies):
        assert secret not in text
    _play(browser, file)
    _review(context, web_alice, entry["id"])


def _review(context: BrowserContext, person: Person, session: str) -> None:
    """The platform's own page lists the requests."""
    page = context.new_page()
    page.goto(f"{person.stack.url}/accounts/login/")
    page.fill("input[name=login]", person.name)
    page.fill("input[name=password]", person.password)
    with page.expect_navigation():
        page.click("main button")
    page.goto(f"{person.stack.url}/sessions/{session}/parts/1")
    row = page.locator("tr", has_text="https://admin.corp.test/auth/user/").first
    expect(row).to_contain_text("GET")
    expect(row).to_contain_text("200")
    page.goto(f"{person.stack.url}/sessions/{session}/parts/1?view=events")
    expect(page.locator("table")).to_contain_text("Content-Type")


def _play(browser: Browser, file: Path) -> None:
    """The file serves as a whole site: nothing is asked of any network."""
    context = browser.new_context()
    context.set_default_timeout(PATIENCE_MS)
    try:
        context.route_from_har(file, not_found="abort")
        page = context.new_page()
        answer = page.goto("https://admin.corp.test/auth/user/")
        assert answer is not None
        assert answer.status == 200
        expect(page).to_have_title(re.compile("Select user"))
    finally:
        context.close()


def test_curl_and_urllib_take_the_programs_port(web_alice: Person) -> None:
    script = "import os, urllib.request as u; print(u.urlopen(os.environ['PAM_URL'] + '/style.css').read())"
    done = web_alice.run("connect", "files/reader", "--", "python3", "-c", script)
    assert "rgb(1, 2, 3)" in done.stdout
    done = web_alice.run(
        "connect", "files/reader", "--", "sh", "-c",
        'for extra in "Origin: http://evil.test" "Sec-Fetch-Site: none" "Host: evil.test"; do '
        'curl -s -o /dev/null -w "%{http_code} " -H "$extra" "$PAM_URL/"; done',
    )  # fmt: skip
    assert done.stdout.split() == ["403"] * 3
