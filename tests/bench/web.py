"""A web application by three ways: requests a second and their times by wrk, and a large download.

    .venv/bin/python tests/bench/bench.py --only web

The application is nginx with files, so that what stands between is what is measured. wrk speaks like a
program (no browser's headers), over connections that stay open. The agent puts a credential into each request
and records each with its answer.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measures import MIB, Measure
from processes import Process, free_port, listens
from ssh_tunnel import DoubleTunnel
from stack import Stack
from ways import Way

#: A small answer of an API.
SMALL = 1024
CONNECTIONS = (1, 64)
_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0}

_NGINX = """
daemon off; worker_processes 1; pid {folder}/pid; error_log {folder}/error.log; {user}
events {{ worker_connections 512; }}
http {{
  access_log off; sendfile on; tcp_nodelay on; keepalive_requests 100000000;
  types {{ application/json json; }}
  client_body_temp_path {folder}/t1; proxy_temp_path {folder}/t2; fastcgi_temp_path {folder}/t3;
  uwsgi_temp_path {folder}/t4; scgi_temp_path {folder}/t5;
  server {{ listen 127.0.0.1:{port}; root {folder}/files; }}
}}
"""


@dataclass
class Site(Way):
    """One way to the application: the loopback port where it answers."""

    conninfo: str = ""
    echo: int = 0
    port: int = 0


class Load:
    """wrk's figures, one run for all those of a way and a number of connections."""

    def __init__(self, connections: int, seconds: int) -> None:
        self._connections, self._seconds = connections, seconds
        self._left: dict[str, dict[str, float]] = {}

    def take(self, site: Way, figure: str) -> float:
        """``rate`` (requests a second), ``p50`` or ``p99`` (ms); a figure asked for again means a new run."""
        left = self._left.setdefault(site.name, {})
        if figure not in left:
            assert isinstance(site, Site)
            left.update(wrk(site, self._connections, self._seconds))
        return left.pop(figure)


def wrk(site: Site, connections: int, seconds: int) -> dict[str, float]:
    command = ["wrk", "--latency", "--timeout", "30s", "-t1", f"-c{connections}", f"-d{seconds}s"]
    command.append(f"http://127.0.0.1:{site.port}/small.json")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or "Socket errors" in done.stdout or "Non-2xx" in done.stdout:
        raise RuntimeError(f"wrk by {site.name}: {done.stdout}{done.stderr}")
    found = {"rate": float(re.findall(r"Requests/sec:\s+([\d.]+)", done.stdout)[0])}
    for percent in (50, 99):
        value, unit = re.findall(rf"^\s+{percent}%\s+([\d.]+)(us|ms|s|m)$", done.stdout, re.MULTILINE)[0]
        found[f"p{percent}"] = float(value) * _SECONDS[unit] * 1000
    return found


def download(site: Way, size: int) -> float:
    """MB/s of one large answer."""
    assert isinstance(site, Site)
    view = memoryview(bytearray(1 << 18))
    with socket.create_connection(("127.0.0.1", site.port), timeout=60) as sock:
        # The path is warm, and the connection there.
        sock.sendall(f"HEAD /large HTTP/1.1\r\nHost: 127.0.0.1:{site.port}\r\n\r\n".encode())
        head = sock.recv(4096)
        assert f"Content-Length: {size}".encode() in head, head
        head = f"GET /large HTTP/1.1\r\nHost: 127.0.0.1:{site.port}\r\nConnection: close\r\n\r\n".encode()
        began, total = os.times().elapsed, 0
        sock.sendall(head)
        while got := sock.recv_into(view):
            total += got
        elapsed = os.times().elapsed - began
    assert total > size, total
    return size / 1e6 / elapsed


def measures(seconds: int, size: int) -> list[Measure]:
    """All of the rows; ``size`` of the download in bytes."""
    rows = []
    for count in CONNECTIONS:
        load = Load(count, seconds)
        ends = f"{count} connection{'s' if count > 1 else ''}"
        rows += [
            Measure(f"web requests/s, {ends}", "1/s", _figure(load, "rate"), less=False),
            Measure(f"web p50, {ends}", "ms", _figure(load, "p50")),
            Measure(f"web p99, {ends}", "ms", _figure(load, "p99")),
        ]
    return [*rows, Measure("web download", "MB/s", lambda site: download(site, size), less=False)]


def _figure(load: Load, figure: str) -> Callable[[Way], float]:
    return lambda site: load.take(site, figure)


def cpu(site: Site, seconds: int) -> dict[str, float]:
    """CPU of each process between, in µs per small request on one connection."""
    before = {name: process.cpu_seconds() for name, process in site.processes.items()}
    requests = wrk(site, 1, seconds)["rate"] * seconds
    return {
        name: (process.cpu_seconds() - before[name]) / requests * 1e6
        for name, process in site.processes.items()
    }


@contextlib.contextmanager
def running(folder: Path, size: int) -> Iterator[list[Site]]:
    """nginx, and the ways to it: direct, tunnel, chain."""
    folder.mkdir(mode=0o700)
    with contextlib.ExitStack() as cleanup:
        cleanup.callback(shutil.rmtree, folder, ignore_errors=True)
        port = _serve(folder, size, cleanup)
        tunnel = DoubleTunnel(folder / "tunnel", port)
        cleanup.callback(tunnel.stop)
        stack = cleanup.enter_context(Stack(folder / "stack"))
        stack.resources.append(_resource(folder, port))
        stack.start()
        yield [
            Site("direct", port=port),
            Site("tunnel", port=tunnel.port, processes=dict(tunnel.processes)),
            _chain(stack, folder, cleanup),
        ]


def _serve(folder: Path, size: int, cleanup: contextlib.ExitStack) -> int:
    files = folder / "files"
    files.mkdir()
    (files / "small.json").write_text(('{"a":"' + "x" * SMALL)[: SMALL - 2] + '"}')
    with (files / "large").open("wb") as large:
        for _ in range(size // MIB):
            large.write(os.urandom(MIB))
    port = free_port()
    config = folder / "nginx.conf"
    user = "user root;" if os.geteuid() == 0 else ""
    config.write_text(_NGINX.format(folder=folder, port=port, user=user))
    nginx = shutil.which("nginx") or "/usr/sbin/nginx"
    process = Process("nginx", [nginx, "-c", config, "-p", folder], folder / "nginx.log")
    cleanup.callback(process.stop)
    process.ready_when(lambda: listens(port))
    return port


def _resource(folder: Path, port: int) -> dict[str, Any]:
    password = folder / "password"
    password.touch(mode=0o600)
    password.write_text("not asked for")
    account = {"name": "reader", "user": "reader", "password": {"file": str(password)}}
    return {
        "name": "web",
        "protocol": "http",
        "gateway": "dc1",
        "host": "127.0.0.1",
        "port": port,
        "tls": {"mode": "disable"},
        "accounts": [{**account, "http": {"login": "basic"}}],
    }


def _chain(stack: Stack, folder: Path, cleanup: contextlib.ExitStack) -> Site:
    alice = stack.person("alice")
    alice.login()
    # A command is what gets the listener for programs; this one only stays.
    port = free_port()
    command = alice.command("connect", "web/reader", "--port", str(port), "--", "sleep", "86400")
    client = Process("client", command, folder / "client.log", env=alice.environment())
    cleanup.callback(client.stop)
    client.ready_when(lambda: listens(port))
    parts = {"client": client, "relay": stack.processes["relay"], "agent": stack.processes["dc1-a"]}
    return Site("chain", port=port, processes=parts)


def compare(
    folder: Path, options: argparse.Namespace, interleave: Callable[..., None]
) -> tuple[list[Measure], dict[str, dict[str, float]]]:
    """Take the measures that ``options`` asks for; (rows, CPU in µs per request by way and process)."""
    size = options.bulk_mib * MIB
    rows = [row for row in measures(options.seconds, size) if options.only in row.title]
    if not rows:
        return [], {}
    with running(folder, size) as sites:
        for run in range(options.runs):
            interleave(run, options.runs, rows, sites)
        return rows, {site.name: cpu(site, options.seconds) for site in sites[1:]}
