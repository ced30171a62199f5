"""What is recorded stays recorded when a part dies or is away, and work goes on when it is back."""

from __future__ import annotations

import json
import secrets
import signal
import threading

import psycopg
from processes import wait_for
from stack import Stack
from stored import spooled


def routed(stack) -> bool:
    return bool(stack.status("pam-relay", "relay")["routes"])


def test_kill_9_of_the_agent_loses_nothing_that_a_client_saw(stack, alice, connect, replay) -> None:
    seen: list[int] = []
    with connect(alice) as connected, connected.open() as connection:
        session = connected.session()["id"]

        def work() -> None:
            try:
                for number in range(1_000_000):
                    connection.execute(f"select {number} as counter")
                    seen.append(number)
            except psycopg.Error:
                return

        worker = threading.Thread(target=work)
        worker.start()
        wait_for(lambda: len(seen) > 200, "some statements", timeout=300)
        stack.processes["dc1-a"].kill()
        worker.join(120)
        assert not worker.is_alive()
    stack.restart_agent("dc1-a")
    events = replay(alice, session)
    recorded = {event["sql"] for event in events if event["kind"] == "query"}
    missing = [number for number in seen if f"select {number} as counter" not in recorded]
    assert missing == []
    wait_for(lambda: spooled(stack) == [], "an empty spool")


def test_a_session_goes_on_and_is_uploaded_after_the_platform_was_away(stack, alice, connect, replay) -> None:
    with connect(alice) as connected, connected.open() as connection:
        session = connected.session()["id"]
        stack.processes["platform"].stop()
        try:
            connection.execute("select 'while the platform is away'")
            with connected.open() as second:  # the session is open: no platform is needed for it
                assert second.execute("select 2").fetchone() == (2,)
        finally:
            stack.start_platform()
    events = replay(alice, session)
    assert any("while the platform is away" in event.get("sql", "") for event in events)
    wait_for(lambda: spooled(stack) == [], "an empty spool")


def test_new_sessions_without_a_platform_fail_with_words(stack, alice) -> None:
    stack.processes["platform"].stop()
    try:
        done = alice.run("connect", "demo-db/readonly", "--", "true", check=False)
        assert done.returncode == 69
        assert "does not answer" in done.stderr
    finally:
        stack.start_platform()


def test_a_relay_that_restarts_is_found_again(stack, alice, connect) -> None:
    with connect(alice) as connected:
        connected.open().close()  # the port is there a moment before the relay was reached
        stack.processes["relay"].stop()
        stack.start_relay()
        wait_for(lambda: routed(stack), "the agent's route after the relay's restart", timeout=120)
        with connected.open() as connection:
            assert connection.execute("select 1").fetchone() == (1,)


def test_a_stopped_agent_drains_and_uploads(stack, alice, connect, replay) -> None:
    with connect(alice) as connected, connected.open() as connection:
        session = connected.session()["id"]
        connection.execute("select 'before the stop'")
        agent = stack.processes["dc1-a"]
        agent.send(signal.SIGTERM)
        # Draining: the open connection lives on.
        connection.execute("select 'while draining'")
        connection.close()
    wait_for(lambda: not agent.running(), "the agent to end", timeout=120)
    stack.restart_agent("dc1-a")
    sql = [event.get("sql", "") for event in replay(alice, session)]
    assert any("while draining" in text for text in sql)


def test_a_full_spool_ends_sessions_with_words_and_recovers(tmp_path_factory, postgres) -> None:
    with Stack(tmp_path_factory.mktemp("small"), agent_config={"recording": {"max_spool": "2MiB"}}) as small:
        small.add_database(postgres, name="small-db")
        small.start()
        alice = small.person("alice")
        alice.login()
        file = small.folder / "fill.sql"
        # Random text, or it would compress away.
        file.write_text("\n".join(f"select '{secrets.token_hex(50_000)}';" for _ in range(60)))
        done = alice.run(
            "connect",
            "small-db/readonly",
            "--",
            "psql",
            "-X",
            "-o",
            "/dev/null",
            "-f",
            str(file),
            check=False,
        )
        assert done.returncode != 0
        assert "record" in done.stderr

        # By itself: what was recorded is uploaded, the spool has room again.
        def works() -> bool:
            probe = alice.run("connect", "small-db/readonly", "--", "psql", "-Xc", "select 1", check=False)
            return probe.returncode == 0

        wait_for(works, "sessions to work again", timeout=120)


def test_everything_works_with_postgresql_as_the_platforms_store(tmp_path_factory, postgres, replay) -> None:
    postgres.sql("create role pam login password 'pam-store'", "create database pam owner pam")
    url = f"postgresql://pam@127.0.0.1:{postgres.port}/pam"
    folder = tmp_path_factory.mktemp("on-postgresql")
    password = folder / "db-password"
    password.touch(mode=0o600)
    password.write_text("pam-store")
    with Stack(folder, database_url={"url": url, "password_file": str(password)}) as stack:
        stack.add_database(postgres, name="other-db")
        stack.start()
        alice = stack.person("alice")
        alice.login()
        alice.run("connect", "other-db/readonly", "--", "psql", "-Xc", "select 'kept in postgresql'")
        session = json.loads(alice.run("sessions", "ls", "--json").stdout)[0]["id"]
        assert any("kept in postgresql" in event.get("sql", "") for event in replay(alice, session))
