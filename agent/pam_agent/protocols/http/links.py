r"""Absolute links to the app's own name within its pages, put right on their way. No I/O.

Many apps build their links from the Host they are asked under, which is their own name here, so a page would
lead its browser to an address that only the agent can reach. In pages (``text/html``, uncompressed) every
``https://app/…``, ``//app/…``, ``wss://app/…`` and, as scripts write it, ``https:\/\/app`` becomes the local
origin. Links that a script puts together, those in style sheets and in scripts of their own, and those in a
compressed answer stay as they are.
"""

from __future__ import annotations

import re

from pam_agent.protocols.http.rewrite import Origins


class LinkRewriter:
    """Feed it a page piece by piece: the result does not depend on where the pieces end."""

    def __init__(self, origins: Origins) -> None:
        self._local = origins.local.removeprefix("http://").encode()
        hosts = sorted((re.escape(host).encode() for host in origins.own_hosts()), key=len, reverse=True)
        self._pattern = re.compile(
            rb"(?:(?<!\w)(https?|wss?):|(?<![:\w/\\]))(\\?/)(\\?/)(?:"
            + b"|".join(hosts)
            + rb")(?![\w.\-:@])",
            re.IGNORECASE,
        )
        # A match and the character behind it: so much of the end cannot be decided yet.
        self._longest = len(rb"https:\/\/") + max(map(len, origins.own_hosts())) + 1
        self._context = b""  # the character before what is pending, which is gone already
        self._pending = b""

    def feed(self, data: bytes) -> bytes:
        return self._run(data, self._longest)

    def finish(self) -> bytes:
        return self._run(b"", 0)

    def _run(self, data: bytes, undecided: int) -> bytes:
        buffer = self._context + self._pending + data
        position = len(self._context)
        limit = max(position, len(buffer) - undecided)
        out = []
        for found in self._pattern.finditer(buffer, position):
            if found.start() >= limit:
                break
            out += [buffer[position : found.start()], self._replacement(found)]
            position = found.end()
        end = max(position, limit)
        out.append(buffer[position:end])
        self._context = buffer[max(0, end - 1) : end]
        self._pending = buffer[end:]
        return b"".join(out)

    def _replacement(self, found: re.Match[bytes]) -> bytes:
        scheme = b"ws:" if (found[1] or b"").lower().startswith(b"ws") else b"http:"
        return (scheme if found[1] else b"") + found[2] + found[3] + self._local
