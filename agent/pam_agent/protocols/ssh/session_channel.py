"""A ``session`` channel: a shell, a command or a subsystem (RFC 4254, chapter 6).

What may start is the account's; agent and X11 forwarding never are. With a terminal its screen is recorded,
without one the first bytes of each stream; SFTP is followed file by file, and so is ``scp -O``, whose streams
are recorded like those of any command as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from pam_agent.protocols.base import ClientProtocolError, Event, TargetProtocolError
from pam_agent.protocols.ssh import scp
from pam_agent.protocols.ssh.channel import TARGET, USER
from pam_agent.protocols.ssh.codec import Pty, Reader, Request
from pam_agent.protocols.ssh.policy import Policy
from pam_agent.protocols.ssh.sftp import SftpWatch
from pam_agent.protocols.ssh.terminal import Terminal
from pam_agent.protocols.ssh.watch import Content, Verdict

#: What Linux takes as one argument of a program is 128 KiB, and a packet has less than 35000 bytes.
MAX_COMMAND: Final = 32 << 10
#: Variables that are set before the start: LANG and the dozen LC_*, and some of one's own. All are one event,
#: which may have 1 MiB with six bytes for each of these.
MAX_ENVIRONMENT: Final = 64
MAX_VALUE: Final = 1024

_STARTS: Final = ("shell", "exec", "subsystem")
#: Passed to the target as they are: they act on what runs already.
_LATER: Final = frozenset({"signal", "break", "xon-xoff", "eow@openssh.com"})
#: From the target; keepalives are answered by the user's program, end to end.
_FROM_TARGET: Final = frozenset({"xon-xoff", "eow@openssh.com", "keepalive@openssh.com"})

Answer = tuple[Verdict, Sequence[Event]]


class SessionWatch:
    """The :class:`~pam_agent.protocols.ssh.watch.Watch` of a session channel ``number``."""

    def __init__(self, number: int, policy: Policy, budget: int) -> None:
        self._number = number
        self._policy = policy
        self._pty: Pty | None = None
        self._environment: dict[str, str] = {}
        self._started = ""
        self._asked: list[str] = []  # kinds that were passed on and want an answer, in order
        self._terminal: Terminal | None = None
        self._sftp: SftpWatch | None = None
        self._scp: scp.ScpWatch | None = None
        self._streams = {name: Content(budget) for name in ("stdin", "stdout", "stderr")}

    def event(self, kind: str, **fields: Any) -> Event:
        return {"kind": kind, "ch": self._number, **fields}

    def opened(self, ok: bool, reason: str) -> Sequence[Event]:
        return () if ok else [self.event("refused", what="session", reason=reason)]

    # -- data ------------------------------------------------------------------------------------------

    def data(self, side: int, stream: str, data: memoryview) -> Sequence[Event]:
        content = self._streams[stream]
        if self._terminal is not None:
            content.bytes += len(data)
            return self._terminal_data(side, bytes(data))
        if self._sftp is not None and stream != "stderr":
            content.bytes += len(data)
            return self._sftp.feed(side, data)
        text = content.take(data)
        events: list[Event] = []
        if text is not None:
            direction = "up" if side == USER else "down"
            events.append(self.event("data", dir=direction, stream=stream, data=text, bytes=len(data)))
        if self._scp is not None and stream != "stderr":
            events += self._scp.feed(side, data)
        return events

    def _terminal_data(self, side: int, data: bytes) -> Sequence[Event]:
        assert self._terminal is not None
        if side == USER:
            return [self.event("i", **self._terminal.typed(data))]
        text, echoed = self._terminal.printed(data)
        events = [self.event("i", data=typed) for typed in echoed]
        if text:
            events.append(self.event("o", data=text))
        return events

    def ended(self, side: int) -> Sequence[Event]:
        return ()

    def closed(self) -> Sequence[Event]:
        followed = self._sftp or self._scp
        events = list(followed.closed()) if followed is not None else []
        up = self._streams["stdin"].bytes
        down = self._streams["stdout"].bytes + self._streams["stderr"].bytes
        hashes = {}
        if self._terminal is None and self._sftp is None:
            hashes = {name: content.sha256 for name, content in self._streams.items() if content.bytes}
        events.append(self.event("close", up=up, down=down, **({"sha256": hashes} if hashes else {})))
        return events

    # -- requests --------------------------------------------------------------------------------------

    def request(self, side: int, request: Request) -> Answer:
        answer = self._of_target(request) if side == TARGET else self._of_user(request)
        if side == USER and answer[0] is Verdict.PASS and request.wants_reply:
            self._asked.append(request.kind)
        return answer

    def replied(self, side: int, ok: bool) -> Sequence[Event]:
        if side != TARGET or not self._asked:
            return ()
        kind = self._asked.pop(0)
        if ok or kind not in _STARTS:
            return ()
        # The target would not: something else may be started instead (RFC 4254, 6.5).
        self._started, self._terminal, self._sftp, self._scp = "", None, None, None
        return [self.event("refused", what=kind, reason="the target refused it")]

    def _of_user(self, request: Request) -> Answer:
        if request.kind in _STARTS:
            return self._start(request)
        if request.kind == "pty-req":
            return self._terminal_wanted(request)
        if request.kind == "env":
            return self._variable(request)
        if request.kind == "window-change":
            return self._resized(request)
        if request.kind in _LATER and self._started:
            if request.kind == "signal":
                name = Reader(request.body, ClientProtocolError, 0).text(32)
                return Verdict.PASS, [self.event("signal", name=name)]
            return Verdict.PASS, ()
        return self._refused(request.kind)

    def _refused(self, what: str, reason: str = "not allowed") -> Answer:
        return Verdict.REFUSE, [self.event("refused", what=what, reason=reason)]

    def _terminal_wanted(self, request: Request) -> Answer:
        pty = Pty.parse(request.body)
        if self._pty is not None or self._started or not self._policy.rights & {"shell", "exec"}:
            return self._refused("pty-req")
        self._pty = pty
        return Verdict.PASS, ()

    def _variable(self, request: Request) -> Answer:
        reader = Reader(request.body, ClientProtocolError, 0)
        name, value = reader.text(MAX_VALUE), reader.text(MAX_VALUE)
        if self._started or len(self._environment) >= MAX_ENVIRONMENT or not self._policy.may_set(name):
            return Verdict.REFUSE, ()  # as sshd does: most programs send what they have
        self._environment[name] = value
        return Verdict.PASS, ()

    def _resized(self, request: Request) -> Answer:
        reader = Reader(request.body, ClientProtocolError, 0)
        columns, rows = reader.uint32(), reader.uint32()
        if self._pty is None:
            return Verdict.DROP, ()
        return Verdict.PASS, [self.event("resize", cols=columns, rows=rows)]

    def _start(self, request: Request) -> Answer:
        if self._started:
            return self._refused(request.kind, "something runs on this channel already")
        what, text, fields = request.kind, "", self._start_fields()
        if request.kind != "shell":
            text = Reader(request.body, ClientProtocolError, 0).text(MAX_COMMAND)
            what = "sftp" if (request.kind, text) == ("subsystem", "sftp") else "exec"
            fields = {"command" if request.kind == "exec" else "name": text, **fields}
        if what not in self._policy.rights:
            return Verdict.REFUSE, [
                self.event("refused", what=request.kind, reason=f"{what} is not allowed", **fields)
            ]
        self._started = what
        if what == "sftp":
            self._sftp = SftpWatch(self._number, self._policy.transfer_budget)
        elif self._pty is not None:
            self._terminal = Terminal()
        elif request.kind == "exec":
            self._scp = scp.followed(self._number, text)
        return Verdict.PASS, [self.event("sftp_open" if what == "sftp" else request.kind, **fields)]

    def _start_fields(self) -> dict[str, Any]:
        fields: dict[str, Any] = {"env": self._environment} if self._environment else {}
        if self._pty is not None:
            fields |= {"term": self._pty.term, "cols": self._pty.columns, "rows": self._pty.rows}
        return fields

    def _of_target(self, request: Request) -> Answer:
        reader = Reader(request.body, TargetProtocolError, 0)
        if request.kind == "exit-status":
            return Verdict.PASS, [self._exit(status=reader.uint32())]
        if request.kind == "exit-signal":
            name, core, message = reader.text(32), reader.flag(), reader.text(MAX_VALUE)
            return Verdict.PASS, [self._exit(signal=name, core=core, message=message)]
        return (Verdict.PASS if request.kind in _FROM_TARGET else Verdict.REFUSE), ()

    def _exit(self, **how: Any) -> Event:
        streams = self._streams
        return self.event(
            "exit", **how, up=streams["stdin"].bytes, down=streams["stdout"].bytes + streams["stderr"].bytes
        )
