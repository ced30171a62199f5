"""``pam-relay`` in the hands of an attacker: the real server with a splice that does what it is told.

    python hostile_relay.py FOLDER --config relay.yml run

FOLDER is how a test talks to it. Every channel is numbered from 1; what each side sent goes to
``FOLDER/<number>.up`` and ``.down``. A channel takes ``FOLDER/plan.json`` away if there is one and carries
it out (:class:`Plan`); without one it is honest. What an attack came to is in ``FOLDER/<number>.json``.

The relay sees the lengths of the Noise messages in clear, so it knows where each begins: it attacks by
message, counted from 0 in each direction. Up: 0 and 1 are handshake messages 1 and 3; down: 0 is message 2.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from stream_splice import Splice

from pam_common.errors import AuthenticationError, PamError
from pam_common.keys import b64encode
from pam_common.secure_channel import SecureChannel, deadline, generate_x25519, x25519_public
from pam_common.stream import Data, Stream
from pam_relay import __main__ as relay
from pam_relay import server
from pam_relay.splice import Summary

#: Enough for a peer that answers; the other side's own deadline ends one that does not.
PATIENCE = 60.0


@dataclass(frozen=True)
class Plan:
    """One attack. ``action`` is a name in ACTIONS or ROLES."""

    action: str
    direction: str = "up"
    message: int = 0
    #: Where in the message a bit is flipped; 0 and 1 are its length, negative counts from its end.
    at: int = 40
    #: How a role comes by what it presents: "stolen" as it is, "forged" after a true one, or "none".
    how: str = "none"
    token: str = ""  #: a stolen grant
    gateway: str = "dc1"
    earlier: int = 0  #: an earlier channel, to take bytes from

    def give(self, folder: Path) -> None:
        """Have the next channel carry it out."""
        draft = folder / "plan.draft"
        draft.write_text(json.dumps(asdict(self)))
        draft.rename(folder / "plan.json")


def cut(data: bytes) -> tuple[list[bytes], bytes]:
    """The complete Noise messages of ``data``, each with its length before it, and the rest."""
    messages = []
    while len(data) >= 2 and len(data) >= (end := 2 + int.from_bytes(data[:2], "big")):
        messages.append(data[:end])
        data = data[end:]
    return messages, data


class Direction:
    """One direction of a channel on its way out: keeps what came, attacks, passes on."""

    def __init__(self, splice: HostileSplice, name: str, sink: Stream) -> None:
        self.splice = splice
        plan = splice.plan
        self.plan = plan if plan and plan.action in ACTIONS and plan.direction == name else None
        self.messages: list[bytes] = []  #: as the honest sender sent them
        self.held: bytes = b""
        self._sink = sink
        self._rest = b""
        self._over = False
        self._copy = (splice.folder / f"{splice.number}.{name}").open("wb", buffering=0)

    def sendall(self, data: Data) -> None:
        self._copy.write(data)
        messages, self._rest = cut(self._rest + bytes(data))
        for message in messages:
            number = len(self.messages)
            self.messages.append(message)
            self._pass(message, number)

    def _pass(self, message: bytes, number: int) -> None:
        if self._over:
            return
        if self.held:
            message, self.held = message + self.held, b""
        if self.plan is not None and number == self.plan.message:
            try:
                message = ACTIONS[self.plan.action](self, message, self.plan)
            except BaseException:
                self.splice.abort()  # or a test would wait for ever
                raise
            self.splice.report(done=True)
        if message:
            self._sink.sendall(message)

    def end(self, last: bytes = b"") -> None:
        """Pass nothing more than ``last``; the receiver reads the end that a polite sender makes."""
        if last:
            self._sink.sendall(last)
        self._over = True
        self._sink.shutdown(socket.SHUT_WR)

    def swallow(self) -> None:
        """Pass nothing more, and say nothing."""
        self._over = True

    def shutdown(self, how: int) -> None:
        if self.held:
            self._sink.sendall(self.held)
        if not self._over:
            self._sink.shutdown(how)


class HostileSplice(Splice):
    """A splice that keeps a copy of everything and carries out a plan."""

    folder: Path
    _numbers = 0
    _lock = threading.Lock()

    def __init__(self, client: Stream, agent: Stream, *, name: str = "hostile") -> None:
        with self._lock:
            HostileSplice._numbers += 1
            self.number = HostileSplice._numbers
            self.plan = _take(self.folder)
        self._reported: dict[str, Any] = {}
        self.up = Direction(self, "up", agent)
        self.down = Direction(self, "down", client)
        super().__init__(_Pair(client, self.down), _Pair(agent, self.up), name=name)

    def run(self, count: Callable[[str, int], None] = lambda direction, size: None) -> Summary:
        if self.plan is None or self.plan.action not in ROLES:
            return super().run(count)
        try:
            ROLES[self.plan.action](self, self.plan)
        except (PamError, OSError) as error:
            self.report(failed=f"{type(error).__name__}: {error}")
        self.report(done=True)
        self.abort()
        return Summary(0, 0, True)

    def report(self, **fields: Any) -> None:
        self._reported |= fields
        draft = self.folder / f"{self.number}.draft"
        draft.write_text(json.dumps(self._reported))
        draft.rename(self.folder / f"{self.number}.json")


class _Pair:
    """Receives from one side as it is, sends to it through a Direction."""

    def __init__(self, stream: Stream, sending: Direction) -> None:
        self.recv = stream.recv
        self.sendall = sending.sendall
        self.shutdown = sending.shutdown
        self.close = stream.close
        self.abort = stream.abort


def _take(folder: Path) -> Plan | None:
    taken = folder / "plan.taken"
    try:
        (folder / "plan.json").rename(taken)
    except FileNotFoundError:
        return None
    return Plan(**json.loads(taken.read_text()))


# --- what is done to a message: each returns what is sent in its place ---------------------------------


def _flip(way: Direction, message: bytes, plan: Plan) -> bytes:
    changed = bytearray(message)
    changed[plan.at % len(message)] ^= 0x04
    return bytes(changed)


def _replay(way: Direction, message: bytes, plan: Plan) -> bytes:
    return way.messages[max(0, plan.message - 3)] + message


def _insert(way: Direction, message: bytes, plan: Plan) -> bytes:
    return message[:2] + os.urandom(len(message) - 2) + message


def _reorder(way: Direction, message: bytes, plan: Plan) -> bytes:
    way.held = message
    return b""


def _truncate(way: Direction, message: bytes, plan: Plan) -> bytes:
    way.end(message[: len(message) // 2])
    return b""


def _end(way: Direction, message: bytes, plan: Plan) -> bytes:
    way.end()
    return b""


def _break(way: Direction, message: bytes, plan: Plan) -> bytes:
    way.splice.abort()
    return b""


def _stall(way: Direction, message: bytes, plan: Plan) -> bytes:
    way.swallow()
    return b""


def _delay(way: Direction, message: bytes, plan: Plan) -> bytes:
    time.sleep(1)
    return message


def _reflect(way: Direction, message: bytes, plan: Plan) -> bytes:
    other = way.splice.down if way is way.splice.up else way.splice.up
    return other.messages[-1]


def _swap(way: Direction, message: bytes, plan: Plan) -> bytes:
    """The message of the same number of another channel, of the same session even."""
    name = f"{plan.earlier}.{plan.direction}"
    return cut((way.splice.folder / name).read_bytes())[0][plan.message]


ACTIONS: dict[str, Callable[[Direction, bytes, Plan], bytes]] = {
    "flip": _flip,
    "drop": lambda way, message, plan: b"",
    "duplicate": lambda way, message, plan: message + message,
    "replay": _replay,
    "insert": _insert,
    "reorder": _reorder,
    "truncate": _truncate,
    "end": _end,
    "break": _break,
    "stall": _stall,
    "delay": _delay,
    "reflect": _reflect,
    "swap": _swap,
}


# --- the relay as one of the two ends ------------------------------------------------------------------


def _as_agent(splice: HostileSplice, plan: Plan) -> None:
    """Answer the client with a key of our own and a statement that is not for it."""
    key = generate_x25519()
    statement = b"" if plan.how == "none" else _statement(splice, plan)
    if plan.how == "forged":
        statement = _signed_anew(statement.decode(), noise_key=b64encode(x25519_public(key))).encode()
    client = splice._client
    with deadline(client, PATIENCE):
        channel, grant = SecureChannel.accept(client, gateway=plan.gateway, static=key, statement=statement)
    splice.report(grant=grant.decode(), data=len(channel.recv(1)))


def _statement(splice: HostileSplice, plan: Plan) -> bytes:
    """The agent's own statement, which whoever asks for a handshake gets to see."""
    seen: list[bytes] = []

    def look(_key: bytes, statement: bytes) -> None:
        seen.append(statement)
        raise AuthenticationError("seen enough")

    with contextlib.suppress(AuthenticationError), deadline(splice._agent, PATIENCE):
        SecureChannel.connect(
            splice._agent, gateway=plan.gateway, static=generate_x25519(), check_agent=look, grant=b""
        )
    splice.report(statement=seen[0].decode())
    return seen[0]


def _as_client(splice: HostileSplice, plan: Plan) -> None:
    """Ask the agent in with a key of our own and a grant that is not for it; then say what a client of
    PostgreSQL would."""
    key = generate_x25519()
    grant = plan.token
    if plan.how == "forged":
        bound = {"jwk": {"kty": "OKP", "crv": "X25519", "x": b64encode(x25519_public(key))}}
        grant = _signed_anew(grant, cnf=bound)
    with deadline(splice._agent, PATIENCE):
        channel = SecureChannel.connect(
            splice._agent,
            gateway=plan.gateway,
            static=key,
            check_agent=lambda key, statement: None,
            grant=grant.encode(),
        )
        body = b"\0\3\0\0user\0me\0database\0app\0\0"
        with contextlib.suppress(OSError, PamError):  # refused already: what it says is still to be read
            channel.sendall((len(body) + 4).to_bytes(4, "big") + body)
        splice.report(answer=channel.recv(1 << 16).hex())


def _signed_anew(token: str, **claims: object) -> str:
    """``token`` with other claims, signed by a key of our own under the name of the true one."""
    header = jwt.get_unverified_header(token)
    true = jwt.decode(token, options={"verify_signature": False})
    return jwt.encode(true | claims, Ed25519PrivateKey.generate(), algorithm="EdDSA", headers=header)


def _again(splice: HostileSplice, plan: Plan) -> None:
    """Send the agent all that a client sent on an earlier channel, and see what it answers."""
    messages, _ = cut((splice.folder / f"{plan.earlier}.up").read_bytes())
    agent = splice._agent
    with deadline(agent, PATIENCE):
        answer = b""
        agent.sendall(messages[0])
        while not cut(answer)[0]:
            answer += agent.recv(1 << 16)
        splice.report(answered=len(cut(answer)[0]))
        agent.sendall(b"".join(messages[1:]))
        splice.report(more=len(agent.recv(1 << 16)))


ROLES: dict[str, Callable[[HostileSplice, Plan], None]] = {
    "as-agent": _as_agent,
    "as-client": _as_client,
    "again": _again,
}


def main() -> None:
    HostileSplice.folder = Path(sys.argv.pop(1))
    HostileSplice.folder.mkdir(mode=0o700, exist_ok=True)
    server.Splice = HostileSplice  # type: ignore[misc]
    relay.main()


if __name__ == "__main__":
    main()
