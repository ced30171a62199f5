"""The ways to one database and one echo server: direct, an OpenSSH double tunnel, a bare chain, the chain."""

from __future__ import annotations

import contextlib
import multiprocessing
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from postgres_server import PostgresServer
from processes import Process, free_port, listens
from ssh_tunnel import DoubleTunnel
from stack import Person, Stack

BENCH = Path(__file__).resolve().parent
LOCAL = "host=127.0.0.1 dbname=app sslmode=disable gssencmode=disable"
#: What pam-client takes for PostgreSQL, so that it lets the echo pass: the server there skips it.
STARTUP = struct.pack("!II", 15, 196608) + b"user\0x\0"
#: What the echo server is asked for: ``e`` echo, ``d`` send and ``u`` take so many bytes.
ORDER = struct.Struct("!cQ")
BLOCK = bytes(1 << 18)
#: How often a byte is encrypted or decrypted: for ssh and end to end, in the agent for the recording as well.
PASSES = {"agent": 3, "relay": 2, "client": 2}


@dataclass
class Way:
    """One way: where the database is, where the echo is, and which processes stand between."""

    name: str
    conninfo: str
    echo: int
    processes: dict[str, Process] = field(default_factory=dict)

    def echo_stream(self, what: bytes, size: int = 0) -> socket.socket:
        """A connection to the echo server that has been told what to do."""
        sock = socket.create_connection(("127.0.0.1", self.echo), timeout=60)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.sendall(STARTUP + ORDER.pack(what, size))
        return sock


@dataclass
class Bench:
    """All of it, running."""

    server: PostgresServer
    stack: Stack
    ways: list[Way]
    unrecorded: Way  #: the chain to the same database with nothing recorded
    rowless: Way  #: the chain with statements and results recorded, and no rows


@contextlib.contextmanager
def running(folder: Path, scale: int, profile: str = "") -> Iterator[Bench]:
    """Everything started and filled; ``profile`` is the part that runs under cProfile."""
    with contextlib.ExitStack() as cleanup:
        server = PostgresServer()
        cleanup.callback(server.stop)
        echo = cleanup.enter_context(echo_server())
        stack = cleanup.enter_context(Stack(folder / "stack"))
        stack.agent_program = (sys.executable, BENCH / "agent.py")
        if profile in ("agent", "relay"):
            program = stack.agent_program if profile == "agent" else stack.relay_program
            wrapped = (sys.executable, BENCH / "profiled.py", folder / "profile.txt", program[-1])
            setattr(stack, f"{profile}_program", wrapped)
        stack.add_database(server)
        _more_resources(stack, echo)
        stack.start()
        _fill(server, scale)
        password = (stack.folder / "secrets" / "demo-db-rw").read_text()
        account = f"user=demo_db_rw password={password}"
        ways = [Way("direct", f"{LOCAL} port={server.port} {account}", echo)]
        ways.append(cleanup.enter_context(_tunnel(folder, server, echo, account)))
        ways.append(cleanup.enter_context(_bare(folder, server, echo, account)))
        ways.append(cleanup.enter_context(_chain(stack, folder)))
        alice = stack.person("alice")
        others = [
            Way(name, f"{LOCAL} user=me port={_connected(alice, f'{name}/owner', folder, cleanup)[0]}", 0)
            for name in ("unrecorded", "rowless")
        ]
        yield Bench(server, stack, ways, *others)


def _more_resources(stack: Stack, echo: int) -> None:
    """The same database under other names, by which the agent tells what to leave out; and the echo."""
    first = stack.resources[0]
    stack.resources.append({**first, "name": "unrecorded"})
    stack.resources.append({**first, "name": "rowless", "rows_budget": 0})
    stack.resources.append({**first, "name": "echo", "port": echo})


def _fill(server: PostgresServer, scale: int) -> None:
    command = [str(server.bin / "pgbench"), "-i", "-q", "-s", str(scale)]
    environment = server.environment(database="app")
    subprocess.run(command, env=environment, check=True, capture_output=True)
    server.sql("grant all on all tables in schema public to demo_db_rw", database="app")


@contextlib.contextmanager
def _tunnel(folder: Path, server: PostgresServer, echo: int, account: str) -> Iterator[Way]:
    with contextlib.ExitStack() as cleanup:
        rivals = []
        for name, port in (("tunnel", server.port), ("echo-tunnel", echo)):
            rivals.append(DoubleTunnel(folder / name, port))
            cleanup.callback(rivals[-1].stop)
        conninfo = f"{LOCAL} port={rivals[0].port} {account}"
        yield Way("tunnel", conninfo, rivals[1].port, dict(rivals[0].processes))


@contextlib.contextmanager
def _bare(folder: Path, server: PostgresServer, echo: int, account: str) -> Iterator[Way]:
    """What three processes in Python take that do nothing but receive, encrypt and send (`bare.py`)."""
    with contextlib.ExitStack() as cleanup:
        port, processes = _hops(folder, server.port, cleanup)
        echo, _ = _hops(folder, echo, cleanup)
        yield Way("bare", f"{LOCAL} port={port} {account}", echo, processes)


def _hops(folder: Path, target: int, cleanup: contextlib.ExitStack) -> tuple[int, dict[str, Process]]:
    processes = {}
    for name, passes in PASSES.items():
        port = free_port()
        command = [sys.executable, BENCH / "bare.py", str(port), str(target), str(passes)]
        processes[name] = Process(f"bare {name}", command, folder / f"bare-{port}.log")
        cleanup.callback(processes[name].stop)
        processes[name].ready_when(lambda port=port: listens(port))
        target = port
    return target, processes


@contextlib.contextmanager
def _chain(stack: Stack, folder: Path) -> Iterator[Way]:
    alice = stack.person("alice")
    alice.login()
    with contextlib.ExitStack() as cleanup:
        port, client = _connected(alice, "demo-db/owner", folder, cleanup)
        echo, _ = _connected(alice, "echo/owner", folder, cleanup)
        parts = {"client": client, "relay": stack.processes["relay"], "agent": stack.processes["dc1-a"]}
        yield Way("chain", f"{LOCAL} user=me port={port}", echo, parts)


def _connected(
    person: Person, account: str, folder: Path, cleanup: contextlib.ExitStack
) -> tuple[int, Process]:
    port = free_port()
    command = person.command("connect", account, "--port", str(port))
    client = Process("client", command, folder / f"client-{port}.log", env=person.environment())
    cleanup.callback(client.stop)
    client.ready_when(lambda: listens(port))
    return port, client


def another_client(stack: Stack, folder: Path, cleanup: contextlib.ExitStack) -> str:
    """A session of its own, by a client process of its own; returns the connection string."""
    port, _ = _connected(stack.person("alice"), "demo-db/owner", folder, cleanup)
    return f"{LOCAL} user=me port={port}"


# -- the echo server -------------------------------------------------------------------------------------


@contextlib.contextmanager
def echo_server() -> Iterator[int]:
    """A process that does what connections ask for; the port it listens on."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=64)
    process = multiprocessing.get_context("fork").Process(target=_serve, args=(listener,), daemon=True)
    process.start()
    try:
        yield int(listener.getsockname()[1])
    finally:
        process.terminate()
        process.join()
        listener.close()


def _serve(listener: socket.socket) -> None:
    while True:
        sock, _ = listener.accept()
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        threading.Thread(target=_answer, args=(sock,), daemon=True).start()


def _answer(sock: Any) -> None:
    with contextlib.suppress(OSError, struct.error), sock:
        sock.recv(len(STARTUP), socket.MSG_WAITALL)
        what, size = ORDER.unpack(sock.recv(ORDER.size, socket.MSG_WAITALL))
        if what == b"e":
            while data := sock.recv(1 << 17):
                sock.sendall(data)
        elif what == b"d":
            for _ in range(size // len(BLOCK)):
                sock.sendall(BLOCK)
        else:
            view = memoryview(bytearray(1 << 18))
            while size > 0 and (got := sock.recv_into(view)):
                size -= got
            sock.sendall(b"x")
        sock.shutdown(socket.SHUT_WR)
        while sock.recv(1 << 17):
            pass
