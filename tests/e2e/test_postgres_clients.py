"""What people and programs do with PostgreSQL all day, through the whole chain."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import signal
import socket
import subprocess
import threading
from pathlib import Path

import asyncpg
import psycopg
import pytest
from processes import free_port, wait_for


def test_a_command_gets_a_database_without_a_password(alice, replay) -> None:
    done = alice.run(
        "connect", "demo-db/readonly", "--", "psql", "-XAt", "-c", "select current_user, 'marker-1'"
    )
    assert "demo_db_ro|marker-1" in done.stdout
    events = replay(alice, alice.newest())
    assert any("marker-1" in event.get("sql", "") for event in events)
    assert any(event["kind"] == "result" and event.get("tag") == "SELECT 1" for event in events)


def test_the_exit_code_is_the_commands_own(alice) -> None:
    done = alice.run("connect", "demo-db/readonly", "--", "sh", "-c", "exit 7", check=False)
    assert done.returncode == 7


def test_the_database_is_limited_by_the_account(alice) -> None:
    command = ["psql", "-XAt", "-d", "postgres", "-c", "select 1"]
    done = alice.run("connect", "demo-db/readonly", "--", *command, check=False)
    assert done.returncode == 2
    assert "app" in done.stderr


def test_the_account_bounds_what_can_be_done(alice) -> None:
    done = alice.run(
        "connect", "demo-db/readonly", "--", "psql", "-X", "-c", "create table t (i int)", check=False
    )
    assert done.returncode == 1
    assert "permission denied" in done.stderr


def test_pgbench_runs_for_half_a_minute_without_an_error(alice, connect, tool) -> None:
    with connect(alice) as connected:
        tool(connected.environment(), "pgbench", "-i", "-q", "-s", "5")
        done = tool(connected.environment(), "pgbench", "-c", "8", "-j", "2", "-T", "30")
        assert "number of failed transactions: 0" in done.stdout
        done = tool(connected.environment(), "pgbench", "-c", "4", "-T", "2", "-M", "prepared", "-S")
        assert "number of failed transactions: 0" in done.stdout


def test_a_dump_through_the_chain_restores_to_the_same_database(
    alice, connect, tool, postgres, tmp_path: Path
) -> None:
    postgres.sql(
        "create table if not exists large as select i, md5(i::text) as hash, repeat('ü', i % 500) as pad"
        " from generate_series(1, 200000) i",
        "grant all on all tables in schema public to demo_db_rw",
        database="app",
    )
    postgres.sql("create database restored")
    dump = tmp_path / "app.dump"
    with connect(alice) as connected:
        tool(connected.environment(), "pg_dump", "-Fc", "-t", "large", "-f", str(dump))
    admin = postgres.environment(database="restored")
    tool(admin, "pg_restore", "-d", "restored", "--no-owner", "--no-acl", str(dump))
    check = "select count(*), md5(string_agg(i || hash || pad, ',' order by i)) from large"
    assert postgres.sql(check, database="restored") == postgres.sql(check, database="app")


def test_interrupting_psql_cancels_its_query_and_no_other(alice, connect, postgres) -> None:
    with connect(alice) as connected, connected.open() as other:
        command = [str(postgres.bin / "psql"), "-X", "-c", "select pg_sleep(600)"]
        psql = subprocess.Popen(
            command, env=connected.environment(), stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        cancelled: list[Exception] = []

        def sleep() -> None:
            try:
                other.execute("select pg_sleep(300)")
            except psycopg.errors.QueryCanceled as error:
                cancelled.append(error)

        sleeper = threading.Thread(target=sleep, daemon=True)
        sleeper.start()
        running = (
            "select count(*) from pg_stat_activity where query like 'select pg_sleep%' and state='active'"
        )
        wait_for(lambda: postgres.sql(running) == "2", "both queries to run")
        psql.send_signal(signal.SIGINT)
        _, said = psql.communicate(timeout=120)
        assert "canceling statement due to user request" in said
        assert postgres.sql(running) == "1"
        assert not cancelled
        postgres.sql(running.replace("count(*)", "pg_cancel_backend(pid)"))
        sleeper.join(120)
        assert len(cancelled) == 1
        assert other.execute("select 7").fetchone() == (7,)


def test_a_pool_of_fifty_shares_one_session(alice, connect) -> None:
    with connect(alice) as connected, contextlib.ExitStack() as pool:
        connections = [pool.enter_context(connected.open()) for _ in range(50)]
        backends = {c.execute("select pg_backend_pid()").fetchone() for c in connections}
        assert len(backends) == 50

        def active() -> int:
            return sum(row["state"] == "active" for row in rows(alice))

        # One that was ended before may be on its way to the platform's list of the past.
        wait_for(lambda: active() == 1, "one session alone")


def test_psycopg_pipeline_mode_and_binary_parameters(alice, connect, replay) -> None:
    with connect(alice) as connected:
        with connected.open() as connection:
            with connection.pipeline():
                cursors = [
                    connection.execute("select %b::int4 + %s::int4", (i, 100), prepare=True)
                    for i in range(200)
                ]
            assert [c.fetchone() for c in cursors] == [(i + 100,) for i in range(200)]
            with pytest.raises(psycopg.errors.DivisionByZero), connection.pipeline():
                connection.execute("select 1/%s::int4", (0,))
        session = connected.session()["id"]
    events = replay(alice, session)
    assert sum(event["kind"] == "result" for event in events) >= 200
    assert any(event.get("error", {}).get("code") == "22012" for event in events)


def test_asyncpg_works(alice, connect) -> None:
    async def work(port: int) -> list[int]:
        pool = await asyncpg.create_pool(
            host="127.0.0.1", port=port, user="me", database="app", ssl=False, min_size=4, max_size=4
        )
        async with pool:
            values = await asyncio.gather(*(pool.fetchval("select $1::int * 2", i) for i in range(100)))
            async with pool.acquire() as connection:
                await connection.execute("create temp table probe (i int)")
                await connection.copy_records_to_table(
                    "probe", records=[(i,) for i in range(1000)], columns=["i"]
                )
                assert await connection.fetchval("select sum(i) from probe") == 499500
        return list(values)

    with connect(alice) as connected:
        assert asyncio.run(work(connected.port)) == [2 * i for i in range(100)]


def test_notifications_and_large_objects(alice, connect) -> None:
    with connect(alice) as connected, connected.open() as listener, connected.open() as sender:
        listener.execute("listen news")
        sender.execute("notify news, 'hello'")
        notice = next(listener.notifies(timeout=120))
        assert (notice.channel, notice.payload) == ("news", "hello")
        content = os.urandom(300_000)
        with sender.transaction():
            (oid,) = sender.execute("select lo_from_bytea(0, %s)", (content,)).fetchone()
        (back,) = sender.execute("select lo_get(%s)", (oid,)).fetchone()
        assert hashlib.sha256(back).digest() == hashlib.sha256(content).digest()


def test_a_unix_socket_instead_of_a_port(alice, postgres, tmp_path: Path) -> None:
    folder = tmp_path / "s"
    folder.mkdir(mode=0o700)
    process = alice.start("connect", "demo-db/readonly", "--socket", str(folder), stdout=subprocess.DEVNULL)
    try:
        # The name is there before the mode, and that before anybody listens.
        wait_for(lambda: any(map(listens_on, folder.glob(".s.PGSQL.*"))), "the socket")
        at = next(folder.glob(".s.PGSQL.*"))
        assert at.stat().st_mode & 0o777 == 0o600
        port = at.name.rpartition(".")[2]
        with psycopg.connect(f"host={folder} port={port} dbname=app user=x") as connection:
            assert connection.execute("select current_user").fetchone() == ("demo_db_ro",)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(120)


def listens_on(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0


def test_replication_is_refused(alice, connect) -> None:
    with connect(alice) as connected, pytest.raises(psycopg.OperationalError, match="replication"):
        psycopg.connect(connected.conninfo + " replication=database")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user")
def test_another_user_of_the_workstation_cannot_use_the_port(alice, connect) -> None:
    with connect(alice) as connected:
        done = subprocess.run(
            ["/usr/bin/psql", "-X", "-c", "select 1"],
            env={**connected.environment(), "HOME": "/nonexistent"},
            user=65534,
            group=65534,
            extra_groups=[],
            cwd="/",
            capture_output=True,
            text=True,
            timeout=90,
            check=False,
        )
        assert done.returncode == 2
        assert "1 row" not in done.stdout
        with connected.open() as connection:
            assert connection.execute("select 1").fetchone() == (1,)


def test_the_port_of_a_resource_stays_the_same(alice) -> None:
    def port() -> str:
        return (
            str(alice.run("connect", "demo-db/readonly", "--", "sh", "-c", 'echo "port=$PGPORT"').stdout)
            .split("port=")[1]
            .split()[0]
        )

    assert port() == port() != str(free_port())


def rows(person):
    return json.loads(person.run("sessions", "ls", "--json").stdout)
