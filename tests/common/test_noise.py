"""The handshake against two independent measures: the noiseprotocol package, and recorded vectors.

The package knows no hybrid pattern, so the hybrid one is composed here, token by token, on its
SymmetricState and with X25519 from another library than ours.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from noise.backends.default import noise_backend
from noise.connection import Keypair, NoiseConnection
from noise.noise_protocol import NoiseProtocol
from noise.state import SymmetricState

from pam_common import noise
from pam_common.errors import AuthenticationError, ProtocolError
from pam_common.noise import XX, XXHFS, CipherState, HandshakeState, Pattern, x25519_public

VECTORS = json.loads((Path(__file__).parent / "secure_channel_vectors.json").read_text())
STATIC_I, STATIC_R, EPHEMERAL_I, EPHEMERAL_R = (bytes([n]) * 32 for n in (1, 2, 3, 4))
KEM = MLKEM768PrivateKey.from_seed_bytes(bytes(range(64)))
PROLOGUE = b"a prologue"


def initiator(pattern: Pattern = XXHFS, prologue: bytes = PROLOGUE) -> HandshakeState:
    return HandshakeState(
        pattern, initiator=True, prologue=prologue, static=STATIC_I, ephemeral=EPHEMERAL_I, kem=KEM
    )


def responder(pattern: Pattern = XXHFS, prologue: bytes = PROLOGUE) -> HandshakeState:
    return HandshakeState(pattern, initiator=False, prologue=prologue, static=STATIC_R, ephemeral=EPHEMERAL_R)


# --- XX against the noiseprotocol package ------------------------------------------------------------


def package_xx(*, initiator: bool) -> NoiseConnection:
    peer = NoiseConnection.from_name(XX.name)
    peer.set_as_initiator() if initiator else peer.set_as_responder()
    peer.set_prologue(PROLOGUE)
    static, ephemeral = (STATIC_I, EPHEMERAL_I) if initiator else (STATIC_R, EPHEMERAL_R)
    peer.set_keypair_from_private_bytes(Keypair.STATIC, static)
    peer.set_keypair_from_private_bytes(Keypair.EPHEMERAL, ephemeral)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fixed ephemeral keys, on purpose
        peer.start_handshake()
    return peer


def test_xx_equals_the_package_message_by_message() -> None:
    ours, theirs = (initiator(XX), responder(XX)), (package_xx(initiator=True), package_xx(initiator=False))
    for number, payload in enumerate([b"", b"statement", b"grant"]):
        writer, reader = number % 2, 1 - number % 2
        message = ours[writer].write_message(payload)
        assert message == theirs[writer].write_message(payload)
        assert ours[reader].read_message(message) == payload
        assert theirs[reader].read_message(message) == payload
    assert ours[0].handshake_hash == ours[1].handshake_hash == theirs[0].get_handshake_hash()
    assert ours[0].remote_static == x25519_public(STATIC_R)
    assert ours[1].remote_static == x25519_public(STATIC_I)


def test_transport_and_rekey_equal_the_package() -> None:
    ours, theirs = initiator(XX), package_xx(initiator=False)
    theirs.read_message(ours.write_message())
    ours.read_message(bytes(theirs.write_message()))
    theirs.read_message(ours.write_message())
    sending, receiving = ours.split()
    for number in range(6):
        text = b"message %d" % number
        assert theirs.decrypt(sending.encrypt(b"", text)) == text
        out, plain = bytearray(len(text) + 16), bytearray(len(text))
        sending.encrypt_into(text, memoryview(out))
        assert theirs.decrypt(bytes(out)) == text
        receiving.decrypt_into(theirs.encrypt(text), memoryview(plain))
        assert bytes(plain) == text
        if number % 2:
            sending.rekey()
            theirs.rekey_inbound_cipher()
            receiving.rekey()
            theirs.rekey_outbound_cipher()


# --- the hybrid against one composed on the package ---------------------------------------------------


class Composed:
    """``Noise_XXhfs…`` written out token by token over the package's SymmetricState."""

    def __init__(
        self, static: bytes, ephemeral: bytes, *, initiator: bool, prologue: bytes = PROLOGUE
    ) -> None:
        self.protocol = NoiseProtocol(XX.name, noise_backend)
        self.protocol.name = XXHFS.name
        self.protocol.handshake_state = SimpleNamespace(initiator=initiator)
        self.state = SymmetricState.initialize_symmetric(self.protocol)
        self.protocol.symmetric_state = self.state
        self.state.mix_hash(prologue)
        self.s, self.e = (X25519PrivateKey.from_private_bytes(key) for key in (static, ephemeral))

    def mix_dh(self, private: X25519PrivateKey, public: bytes) -> None:
        self.state.mix_key(private.exchange(X25519PublicKey.from_public_bytes(public)))

    def write1(self) -> bytes:
        e, e1 = self.e.public_key().public_bytes_raw(), KEM.public_key().public_bytes_raw()
        self.state.mix_hash(e)
        return bytes(e + self.state.encrypt_and_hash(e1) + self.state.encrypt_and_hash(b""))

    def read1(self, message: bytes) -> None:
        self.re = message[:32]
        self.state.mix_hash(self.re)
        self.re1 = self.state.decrypt_and_hash(message[32:1216])
        assert self.state.decrypt_and_hash(message[1216:]) == b""

    def write2(self, payload: bytes) -> bytes:
        e = self.e.public_key().public_bytes_raw()
        self.state.mix_hash(e)
        self.mix_dh(self.e, self.re)
        self.kem_secret, self.kem_ciphertext = MLKEM768PublicKey.from_public_bytes(self.re1).encapsulate()
        ekem1 = self.state.encrypt_and_hash(self.kem_ciphertext)
        self.state.mix_key(self.kem_secret)
        s = self.state.encrypt_and_hash(self.s.public_key().public_bytes_raw())
        self.mix_dh(self.s, self.re)
        return bytes(e + ekem1 + s + self.state.encrypt_and_hash(payload))

    def read2(self, message: bytes) -> bytes:
        self.re = message[:32]
        self.state.mix_hash(self.re)
        self.mix_dh(self.e, self.re)
        self.state.mix_key(KEM.decapsulate(self.state.decrypt_and_hash(message[32:1136])))
        self.rs = self.state.decrypt_and_hash(message[1136:1184])
        self.mix_dh(self.e, self.rs)
        return bytes(self.state.decrypt_and_hash(message[1184:]))

    def write3(self, payload: bytes) -> bytes:
        s = self.state.encrypt_and_hash(self.s.public_key().public_bytes_raw())
        self.mix_dh(self.s, self.re)
        return bytes(s + self.state.encrypt_and_hash(payload))

    def read3(self, message: bytes) -> bytes:
        self.rs = self.state.decrypt_and_hash(message[:48])
        self.mix_dh(self.e, self.rs)
        return bytes(self.state.decrypt_and_hash(message[48:]))


def test_hybrid_initiator_equals_the_composed_one() -> None:
    ours, twin = initiator(), Composed(STATIC_I, EPHEMERAL_I, initiator=True)
    peer = Composed(STATIC_R, EPHEMERAL_R, initiator=False)
    message1 = ours.write_message()
    assert message1 == twin.write1()
    peer.read1(message1)
    message2 = peer.write2(b"statement")
    assert ours.read_message(message2) == twin.read2(message2) == b"statement"
    message3 = ours.write_message(b"grant")
    assert message3 == twin.write3(b"grant")
    assert peer.read3(message3) == b"grant"
    check_transport(ours, peer)


def test_hybrid_responder_is_understood_by_the_composed_initiator() -> None:
    ours, peer = responder(), Composed(STATIC_I, EPHEMERAL_I, initiator=True)
    assert ours.read_message(peer.write1()) == b""
    assert peer.read2(ours.write_message(b"statement")) == b"statement"
    assert ours.read_message(peer.write3(b"grant")) == b"grant"
    assert ours.remote_static == x25519_public(STATIC_I)
    check_transport(ours, peer)


def check_transport(ours: HandshakeState, peer: Composed) -> None:
    assert ours.handshake_hash == peer.state.get_handshake_hash()
    sending, receiving = ours.split()
    peer.state.split()
    theirs = peer.protocol
    assert theirs.cipher_state_decrypt.decrypt_with_ad(b"", sending.encrypt(b"", b"to you")) == b"to you"
    assert receiving.decrypt(b"", theirs.cipher_state_encrypt.encrypt_with_ad(b"", b"to us")) == b"to us"


# --- recorded vectors --------------------------------------------------------------------------------


def vector(name: str) -> bytes:
    return bytes.fromhex(VECTORS[name])


def test_vector_as_initiator() -> None:
    ours = HandshakeState(
        XXHFS,
        initiator=True,
        prologue=vector("prologue"),
        static=vector("initiator_static"),
        ephemeral=vector("initiator_ephemeral"),
        kem=MLKEM768PrivateKey.from_seed_bytes(vector("kem_seed")),
    )
    assert ours.write_message() == vector("message1")
    assert ours.read_message(vector("message2")) == vector("payload2")
    assert ours.write_message(vector("payload3")) == vector("message3")
    assert ours.handshake_hash == vector("handshake_hash")
    sending, receiving = ours.split()
    assert sending.encrypt(b"", vector("transport_plaintext")) == vector("transport_to_responder")
    assert receiving.decrypt(b"", vector("transport_to_initiator")) == vector("transport_plaintext")


def test_vector_as_responder(monkeypatch: pytest.MonkeyPatch) -> None:
    # The library offers no way to choose the encapsulation's randomness: take its recorded outcome.
    monkeypatch.setattr(noise, "_encapsulate", lambda _key: (vector("kem_secret"), vector("kem_ciphertext")))
    ours = HandshakeState(
        XXHFS,
        initiator=False,
        prologue=vector("prologue"),
        static=vector("responder_static"),
        ephemeral=vector("responder_ephemeral"),
    )
    assert ours.read_message(vector("message1")) == b""
    assert ours.write_message(vector("payload2")) == vector("message2")
    assert ours.read_message(vector("message3")) == vector("payload3")
    assert ours.handshake_hash == vector("handshake_hash")
    sending, receiving = ours.split()
    assert receiving.decrypt(b"", vector("transport_to_responder")) == vector("transport_plaintext")
    assert sending.encrypt(b"", vector("transport_plaintext")) == vector("transport_to_initiator")


# --- what an attacker tries --------------------------------------------------------------------------


def complete(
    alter: Callable[[int, bytes], bytes] = lambda _number, message: message,
    first: HandshakeState | None = None,
    second: HandshakeState | None = None,
) -> list[bytes]:
    """Run a handshake through ``alter(number, message)``; return the payloads, or let the error out."""
    ours, peer = first or initiator(), second or responder()
    return [
        peer.read_message(alter(1, ours.write_message())),
        ours.read_message(alter(2, peer.write_message(b"statement"))),
        peer.read_message(alter(3, ours.write_message(b"grant"))),
    ]


def flipped(message: bytes, bit: int) -> bytes:
    altered = bytearray(message)
    altered[bit // 8] ^= 1 << bit % 8
    return bytes(altered)


SIZES = {1: 1216, 2: 1200 + len(b"statement"), 3: 64 + len(b"grant")}


def test_sizes_are_as_documented() -> None:
    seen: dict[int, int] = {}

    def note(number: int, message: bytes) -> bytes:
        seen[number] = len(message)
        return message

    assert complete(note) == [b"", b"statement", b"grant"]
    assert seen == SIZES


@pytest.mark.parametrize("number", SIZES)
def test_every_altered_byte_is_noticed(number: int) -> None:
    for at in range(SIZES[number]):
        # Another bit in each byte; together they cover all eight, the ignored top bit of X25519 among them.
        bit = 8 * at + (7 if at == 31 else at % 8)
        with pytest.raises((AuthenticationError, ProtocolError)):
            complete(lambda n, message, bit=bit: flipped(message, bit) if n == number else message)


@pytest.mark.parametrize("number", SIZES)
@pytest.mark.parametrize("size", [0, 1, 31, 32, 47, 63])
def test_cut_and_lengthened_messages_are_noticed(number: int, size: int) -> None:
    with pytest.raises((AuthenticationError, ProtocolError)):
        complete(lambda n, message: message[:size] if n == number else message)
    with pytest.raises((AuthenticationError, ProtocolError)):
        complete(lambda n, message: message[: -size - 1] if n == number else message)
    with pytest.raises((AuthenticationError, ProtocolError)):
        complete(lambda n, message: message + bytes(size + 1) if n == number else message)


def test_messages_of_another_handshake_are_noticed() -> None:
    other = HandshakeState(XXHFS, initiator=True, prologue=PROLOGUE, static=STATIC_I)
    recorded: dict[int, bytes] = {}
    complete(lambda n, message: recorded.setdefault(n, message), first=other)
    for number in (2, 3):
        with pytest.raises(AuthenticationError):
            complete(lambda n, message, number=number: recorded[n] if n == number else message)


def test_prologues_must_agree() -> None:
    with pytest.raises(AuthenticationError):
        complete(second=responder(prologue=b"another prologue"))


#: Points of small order (RFC 7748, section 6.1 and https://cr.yp.to/ecdh.html): the secret would be zero.
DEGENERATE = [
    "00" * 32,
    "01" + "00" * 31,
    "e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800",
    "5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157",
    "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
]


@pytest.mark.parametrize("point", DEGENERATE)
def test_degenerate_keys_are_refused(point: str) -> None:
    with pytest.raises(AuthenticationError, match="degenerate"):
        noise.dh(STATIC_I, bytes.fromhex(point))
    peer = responder()
    with pytest.raises(AuthenticationError, match="degenerate"):
        complete(lambda n, message: bytes.fromhex(point) + message[32:] if n == 1 else message, second=peer)


def test_malformed_kem_key_is_refused() -> None:
    # Coefficients of 4095, which are not reduced modulo 3329 (FIPS 203, section 7.2).
    with pytest.raises(ProtocolError, match="ML-KEM key is malformed"):
        complete(lambda n, message: message[:32] + b"\xff" * 1184 if n == 1 else message)


# --- misuse by our own code --------------------------------------------------------------------------


def test_a_handshake_that_failed_stays_failed() -> None:
    ours = initiator()
    ours.write_message()
    with pytest.raises(ProtocolError):
        ours.read_message(b"short")
    calls: list[Callable[[], Any]] = [ours.write_message, lambda: ours.read_message(b""), ours.split]
    for call in calls:
        with pytest.raises(RuntimeError):
            call()


def test_calls_out_of_turn_are_refused() -> None:
    with pytest.raises(RuntimeError):
        initiator().read_message(b"")
    with pytest.raises(RuntimeError):
        responder().write_message()
    with pytest.raises(RuntimeError):
        initiator().split()
    with pytest.raises(RuntimeError):
        _ = initiator().remote_static


def test_split_gives_keys_once() -> None:
    ours, peer = initiator(), responder()
    complete(first=ours, second=peer)
    ours.split()
    with pytest.raises(RuntimeError):
        ours.split()


def test_payload_that_does_not_fit() -> None:
    with pytest.raises(ValueError, match="does not fit"):
        initiator().write_message(bytes(65536 - 1216))


def test_nonces_never_repeat() -> None:
    cipher = CipherState(bytes(32))
    cipher.nonce = noise.MAX_NONCE - 1
    cipher.encrypt(b"", b"last")
    with pytest.raises(ProtocolError, match="too many"):
        cipher.encrypt(b"", b"one more")


def test_fresh_keys_differ() -> None:
    messages = {
        HandshakeState(XXHFS, initiator=True, prologue=b"", static=STATIC_I).write_message() for _ in range(3)
    }
    assert len({message[:32] for message in messages}) == len({message[32:] for message in messages}) == 3


def test_representations_show_no_key() -> None:
    assert repr(CipherState(b"k" * 32)) == "CipherState(nonce=0)"
    assert "\\x01" not in repr(initiator())
