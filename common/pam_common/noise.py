"""The Noise Protocol Framework (revision 34) with its hybrid forward secrecy extension, as far as we use it.

    Noise_XXhfs_25519+MLKEM768_AESGCM_BLAKE2b

      -> e, e1
      <- e, ee, ekem1, s, es
      -> s, se

``e1`` is an ML-KEM-768 encapsulation key that lives for one handshake, ``ekem1`` the ciphertext made for
it; both pass EncryptAndHash, then the KEM's secret goes through MixKey. What is encrypted from there on
stays secret unless X25519 *and* ML-KEM are broken. Authentication rests on X25519 alone.

Names and steps are those of the specifications, so that code and text can be read side by side:
https://noiseprotocol.org/noise.html and https://github.com/noiseprotocol/noise_hfs_spec.
Nothing here does I/O. Message 1 of a pattern carries its payload in clear text.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from dataclasses import dataclass

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from nacl.bindings import crypto_scalarmult, crypto_scalarmult_base
from nacl.exceptions import CryptoError

from pam_common.errors import AuthenticationError, ProtocolError
from pam_common.stream import Data

DHLEN = 32
HASHLEN = 64
TAGLEN = 16
#: ML-KEM-768 (FIPS 203, table 3): encapsulation key, ciphertext.
KEM_KEYLEN = 1184
KEM_CIPHERLEN = 1088
#: No Noise message is longer.
MAX_MESSAGE = 65535
#: This nonce is for Rekey() only.
MAX_NONCE = 2**64 - 1


@dataclass(frozen=True)
class Pattern:
    """A handshake: its full protocol name and the tokens of each message, the initiator's first."""

    name: bytes
    messages: tuple[tuple[str, ...], ...]


XXHFS = Pattern(
    b"Noise_XXhfs_25519+MLKEM768_AESGCM_BLAKE2b",
    (("e", "e1"), ("e", "ee", "ekem1", "s", "es"), ("s", "se")),
)
#: The same without the hybrid tokens. No channel uses it; it exists so that everything but those tokens
#: can be compared, message by message, with other implementations.
XX = Pattern(b"Noise_XX_25519_AESGCM_BLAKE2b", (("e",), ("e", "ee", "s", "es"), ("s", "se")))


def generate_x25519() -> bytes:
    """Return a new private key of 32 bytes."""
    return secrets.token_bytes(DHLEN)


def x25519_public(private: bytes) -> bytes:
    """Return the 32 byte public key of a private key."""
    public: bytes = crypto_scalarmult_base(private)
    return public


def dh(private: bytes, public: bytes) -> bytes:
    """Return the X25519 secret. A public key that makes it all zero raises AuthenticationError.

    Noise leaves that check open; without it a peer could choose keys that make the secret known to all.
    """
    try:
        secret: bytes = crypto_scalarmult(private, public)
    except CryptoError:
        raise AuthenticationError("the peer's X25519 key is degenerate") from None
    if hmac.compare_digest(secret, bytes(DHLEN)):
        raise AuthenticationError("the peer's X25519 key is degenerate")
    return secret


def _hash(data: bytes) -> bytes:
    return hashlib.blake2b(data).digest()


def _hkdf(chaining_key: bytes, material: bytes) -> tuple[bytes, bytes]:
    """HKDF with two outputs of HASHLEN bytes (Noise, section 4.3)."""
    temp_key = hmac.digest(chaining_key, material, "blake2b")
    output1 = hmac.digest(temp_key, b"\x01", "blake2b")
    return output1, hmac.digest(temp_key, output1 + b"\x02", "blake2b")


class CipherState:
    """AES-256-GCM under one key with a counting nonce (Noise, section 5.1).

    For one thread at a time. A message that fails leaves the state unusable by convention: callers end.
    """

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._aead = AESGCM(key)
        self.nonce = 0

    def encrypt(self, ad: bytes, plaintext: Data) -> bytes:
        """Return ciphertext and tag."""
        return self._aead.encrypt(self._next_nonce(), plaintext, ad)

    def decrypt(self, ad: bytes, ciphertext: Data) -> bytes:
        """Return the plaintext; raise AuthenticationError when it is not what the peer encrypted next."""
        if len(ciphertext) < TAGLEN:
            raise ProtocolError("a message too short to be encrypted")
        try:
            return self._aead.decrypt(self._next_nonce(), ciphertext, ad)
        except InvalidTag:
            raise AuthenticationError("a message that does not decrypt") from None

    def encrypt_into(self, plaintext: Data, out: memoryview) -> None:
        """Encrypt into ``out``, 16 bytes longer than ``plaintext``, which may be its beginning."""
        self._aead.encrypt_into(self._next_nonce(), plaintext, None, out)

    def decrypt_into(self, ciphertext: Data, out: memoryview) -> None:
        """Decrypt into ``out``, 16 bytes shorter than ``ciphertext``.

        On AuthenticationError ``out`` may hold anything and must not be used.
        """
        try:
            self._aead.decrypt_into(self._next_nonce(), ciphertext, None, out)
        except InvalidTag:
            raise AuthenticationError("a message that does not decrypt") from None

    def rekey(self) -> None:
        """Replace the key by one from which it cannot be computed (section 4.2); the nonce goes on."""
        self._key = self._aead.encrypt(_nonce(MAX_NONCE), bytes(32), None)[:32]
        self._aead = AESGCM(self._key)

    def _next_nonce(self) -> bytes:
        nonce = self.nonce
        if nonce >= MAX_NONCE:
            raise ProtocolError("too many messages under one key")
        self.nonce = nonce + 1
        return _nonce(nonce)

    def __repr__(self) -> str:
        return f"CipherState(nonce={self.nonce})"


def _nonce(counter: int) -> bytes:
    """32 zero bits and the counter in big-endian order (section 12.4): as one number of 12 bytes."""
    return counter.to_bytes(12, "big")


class SymmetricState:
    """Chaining key, transcript hash and, once a secret was mixed in, a cipher (section 5.2)."""

    def __init__(self, protocol_name: bytes) -> None:
        if len(protocol_name) <= HASHLEN:
            self.hash = protocol_name.ljust(HASHLEN, b"\0")
        else:
            self.hash = _hash(protocol_name)
        self._chaining_key = self.hash
        self._cipher: CipherState | None = None

    @property
    def overhead(self) -> int:
        """How many bytes encryption adds now."""
        return 0 if self._cipher is None else TAGLEN

    def mix_key(self, material: bytes) -> None:
        self._chaining_key, temp_key = _hkdf(self._chaining_key, material)
        self._cipher = CipherState(temp_key[:32])

    def mix_hash(self, data: bytes) -> None:
        self.hash = _hash(self.hash + data)

    def encrypt_and_hash(self, plaintext: bytes) -> bytes:
        ciphertext = plaintext if self._cipher is None else self._cipher.encrypt(self.hash, plaintext)
        self.mix_hash(ciphertext)
        return ciphertext

    def decrypt_and_hash(self, ciphertext: bytes) -> bytes:
        plaintext = ciphertext if self._cipher is None else self._cipher.decrypt(self.hash, ciphertext)
        self.mix_hash(ciphertext)
        return plaintext

    def split(self) -> tuple[CipherState, CipherState]:
        """Return the ciphers of the initiator's and of the responder's direction."""
        key1, key2 = _hkdf(self._chaining_key, b"")
        return CipherState(key1[:32]), CipherState(key2[:32])


class HandshakeState:
    """One side of a handshake (section 5.3): ``write_message`` and ``read_message`` in turn, then ``split``.

    A message that fails raises AuthenticationError (altered, another prologue, another key) or
    ProtocolError (cut, a malformed key), and the state refuses everything afterwards. A call out of turn is
    the caller's bug: RuntimeError. ``ephemeral`` and ``kem`` are for tests with known answers only.
    """

    def __init__(
        self,
        pattern: Pattern,
        *,
        initiator: bool,
        prologue: bytes,
        static: bytes,
        ephemeral: bytes | None = None,
        kem: MLKEM768PrivateKey | None = None,
    ) -> None:
        self._symmetric = SymmetricState(pattern.name)
        self._symmetric.mix_hash(prologue)
        self._initiator = initiator
        self._pattern = pattern
        self._step: int | None = 0
        self._static = static
        self._ephemeral = ephemeral or generate_x25519()
        self._kem = kem
        self._remote_static = self._remote_ephemeral = self._remote_kem = b""

    @property
    def remote_static(self) -> bytes:
        """The peer's static public key, once the message that carries it was read."""
        if not self._remote_static:
            raise RuntimeError("the peer's static key is not known yet")
        return self._remote_static

    @property
    def handshake_hash(self) -> bytes:
        """The transcript's hash; after the last message it names this handshake uniquely."""
        return self._symmetric.hash

    def write_message(self, payload: bytes = b"") -> bytes:
        """Return the next message, which carries ``payload``."""
        out = bytearray()
        step = self._begin(writing=True)
        for token in self._pattern.messages[step]:
            out += self._write_token(token)
        out += self._symmetric.encrypt_and_hash(payload)
        if len(out) > MAX_MESSAGE:
            raise ValueError("the payload does not fit into a handshake message")
        self._step = step + 1
        return bytes(out)

    def read_message(self, message: bytes) -> bytes:
        """Return the payload of the peer's next message."""
        step = self._begin(writing=False)
        rest = message
        for token in self._pattern.messages[step]:
            rest = self._read_token(token, rest)
        payload = self._symmetric.decrypt_and_hash(rest)
        self._step = step + 1
        return payload

    def split(self) -> tuple[CipherState, CipherState]:
        """Return the ciphers for sending and for receiving. Once, after the last message."""
        if self._step != len(self._pattern.messages):
            raise RuntimeError("the handshake is not complete")
        self._step = None
        first, second = self._symmetric.split()
        return (first, second) if self._initiator else (second, first)

    def _begin(self, *, writing: bool) -> int:
        """Return the number of the message whose turn it is; until it succeeds, the state is failed."""
        step, self._step = self._step, None
        if (
            step is None
            or step >= len(self._pattern.messages)
            or (step % 2 == 0) != (self._initiator == writing)
        ):
            raise RuntimeError("a handshake message out of turn, or after a failure")
        return step

    def _write_token(self, token: str) -> bytes:
        match token:
            case "e":
                public = x25519_public(self._ephemeral)
                self._symmetric.mix_hash(public)
                return public
            case "e1":
                self._kem = self._kem or MLKEM768PrivateKey.generate()
                return self._symmetric.encrypt_and_hash(self._kem.public_key().public_bytes_raw())
            case "ekem1":
                secret, ciphertext = _encapsulate(self._remote_kem)
                encrypted = self._symmetric.encrypt_and_hash(ciphertext)
                self._symmetric.mix_key(secret)
                return encrypted
            case "s":
                return self._symmetric.encrypt_and_hash(x25519_public(self._static))
        self._mix_dh(token)
        return b""

    def _read_token(self, token: str, message: bytes) -> bytes:
        """Process one token at the beginning of ``message`` and return what follows."""
        match token:
            case "e":
                self._remote_ephemeral, rest = _take(message, DHLEN)
                self._symmetric.mix_hash(self._remote_ephemeral)
                return rest
            case "e1":
                self._remote_kem, rest = self._take_encrypted(message, KEM_KEYLEN)
                return rest
            case "ekem1":
                ciphertext, rest = self._take_encrypted(message, KEM_CIPHERLEN)
                assert self._kem is not None
                self._symmetric.mix_key(self._kem.decapsulate(ciphertext))
                return rest
            case "s":
                self._remote_static, rest = self._take_encrypted(message, DHLEN)
                return rest
        self._mix_dh(token)
        return message

    def _take_encrypted(self, message: bytes, size: int) -> tuple[bytes, bytes]:
        encrypted, rest = _take(message, size + self._symmetric.overhead)
        return self._symmetric.decrypt_and_hash(encrypted), rest

    def _mix_dh(self, token: str) -> None:
        """``ee``, ``es``, ``se``: the first letter is the initiator's key, the second the responder's."""
        own, remote = (token[0], token[1]) if self._initiator else (token[1], token[0])
        private = self._ephemeral if own == "e" else self._static
        public = self._remote_ephemeral if remote == "e" else self._remote_static
        self._symmetric.mix_key(dh(private, public))


def _take(message: bytes, size: int) -> tuple[bytes, bytes]:
    if len(message) < size:
        raise ProtocolError("a handshake message that is too short")
    return message[:size], message[size:]


def _encapsulate(public: bytes) -> tuple[bytes, bytes]:
    """Return secret and ciphertext for the peer's ML-KEM key; it is checked as FIPS 203, 7.2 demands."""
    try:
        return MLKEM768PublicKey.from_public_bytes(public).encapsulate()
    except ValueError:
        raise ProtocolError("the peer's ML-KEM key is malformed") from None
