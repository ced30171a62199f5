"""PartReader: the events of a recording, for who holds a recipient's private key.

Whoever wrote the file may be hostile: a 64 KiB chunk can hold 64 MiB of plaintext and a line may never
end. What is held at a time is one line and one piece; the total is the caller's to bound.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO, NoReturn

from nacl import bindings as sodium
from nacl.exceptions import CryptoError
from nacl.exceptions import RuntimeError as SodiumError

from pam_common.keys import key_id
from pam_common.recording.format import ABRUPT_ENDS, MAX_EVENT, Header, RecordingError
from pam_common.recording.scan import Scan

#: More than a day of a busy session within its budgets; a bomb of endless short lines ends here.
MAX_TOTAL = 16 << 30
_PIECE = 65536
#: Seconds: no time of an event is near it. Whoever shows one can add it to a date.
_LONGEST = 1 << 32


class NoRecipientError(RecordingError):
    """None of the keys given opens the recording; ``kids`` names those that do."""

    def __init__(self, kids: Iterable[str]) -> None:
        self.kids = tuple(kids)
        super().__init__(
            "the recording is not sealed to any of the keys given",
            hint="its header names the key ids that open it: " + ", ".join(self.kids),
        )


class PartReader:
    """Decrypts one part. The chain's signature is not checked: ``verify_part`` does that.

    ``private_keys`` are raw X25519 keys (32 bytes); the first that the header names is used. Raises
    RecordingError when the file is no recording, NoRecipientError when none of the keys opens it.
    """

    def __init__(self, file: BinaryIO, private_keys: Iterable[bytes], *, max_bytes: int = MAX_TOTAL) -> None:
        self._scan = Scan(file)
        self._state = sodium.crypto_secretstream_xchacha20poly1305_state()
        sodium.crypto_secretstream_xchacha20poly1305_init_pull(
            self._state, self.header.stream, _part_key(self.header, private_keys)
        )
        self._zlib = zlib.decompressobj(15)
        self._left = max_bytes
        self._rest = bytearray()
        self._final = False

    @property
    def header(self) -> Header:
        return self._scan.header

    @property
    def end(self) -> str | None:
        """How the part ended, once the events are through."""
        return self._scan.trailer.end if self._scan.trailer else None

    def events(self) -> Iterator[dict[str, Any]]:
        """Each event as recorded, ``{"t", "c", "kind", …}``. To be called once.

        Everything before a damage is given; then RecordingError says what is wrong.
        """
        for chunk in self._scan.chunks():
            if self._final:
                self._fail("there are chunks after the final one")
            yield from self._lines(self._decrypt(chunk.previous, chunk.ciphertext))
        if self._scan.problem:
            self._fail(self._scan.problem)
        if self.end not in ABRUPT_ENDS and not (self._final and self._zlib.eof and not self._rest):
            self._fail("the recording stops before the end that its trailer states")

    def _decrypt(self, previous: bytes, ciphertext: bytes) -> bytes:
        try:
            plain, tag = sodium.crypto_secretstream_xchacha20poly1305_pull(self._state, ciphertext, previous)
        except (CryptoError, SodiumError):
            self._fail(f"chunk {self._scan.count} does not decrypt: it was altered or is torn")
        if tag == sodium.crypto_secretstream_xchacha20poly1305_TAG_FINAL:
            self._final = True
        elif tag != sodium.crypto_secretstream_xchacha20poly1305_TAG_MESSAGE:
            self._fail(f"chunk {self._scan.count} has a tag that the format does not use")
        return bytes(plain)

    def _lines(self, plain: bytes) -> Iterator[dict[str, Any]]:
        for piece in self._pieces(plain):
            *lines, rest = piece.split(b"\n")
            if lines:
                lines[0] = bytes(self._rest) + lines[0]
                self._rest.clear()
            self._rest += rest  # in place: a line may come in a million pieces
            # One less than the limit: it counts the newline.
            if len(self._rest) >= MAX_EVENT or any(len(line) >= MAX_EVENT for line in lines):
                self._fail(f"chunk {self._scan.count} holds a line longer than {MAX_EVENT} bytes")
            for line in lines:
                yield self._event(line)

    def _pieces(self, plain: bytes) -> Iterator[bytes]:
        while True:
            if self._zlib.eof:
                if plain or self._zlib.unused_data:
                    self._fail("there is data after the end of the compressed stream")
                return
            try:
                piece = self._zlib.decompress(plain, _PIECE)
            except zlib.error:
                self._fail(f"chunk {self._scan.count} does not decompress")
            plain = self._zlib.unconsumed_tail
            self._left -= len(piece)
            if self._left < 0:
                self._fail("the recording holds more than the reader was told to take")
            if piece:
                yield piece
            # A full piece may have more behind it even when all input is taken.
            if not plain and len(piece) < _PIECE and not self._zlib.eof:
                return

    def _event(self, line: bytes) -> dict[str, Any]:
        try:
            event = json.loads(line.decode("ascii"), parse_constant=_no_constant)
        except (ValueError, RecursionError):
            event = None
        if not (isinstance(event, dict) and _is_time(event.get("t")) and isinstance(event.get("kind"), str)):
            self._fail(f"chunk {self._scan.count} holds a line that is no event")
        if type(event.get("c")) is not int:
            self._fail(f"chunk {self._scan.count} holds an event without connection number")
        return event

    def _fail(self, message: str) -> NoReturn:
        raise RecordingError(message)


def _part_key(header: Header, private_keys: Iterable[bytes]) -> bytes:
    for private in private_keys:
        public = sodium.crypto_scalarmult_base(private)
        sealed = header.recipients.get(key_id(public))
        if sealed is None:
            continue
        try:
            key = sodium.crypto_box_seal_open(sealed, public, private)
        except (CryptoError, SodiumError):
            raise RecordingError("the sealed key does not open: the header was altered") from None
        if len(key) != sodium.crypto_secretstream_xchacha20poly1305_KEYBYTES:
            raise RecordingError("the sealed key has the wrong length")
        return bytes(key)
    raise NoRecipientError(header.recipients)


def _is_time(value: object) -> bool:
    # A whole number is compared first: one of hundreds of digits is too large for isfinite.
    if type(value) is int:
        return 0 <= value < _LONGEST
    return type(value) is float and math.isfinite(value) and value >= 0


def _no_constant(name: str) -> NoReturn:
    raise ValueError(name)
