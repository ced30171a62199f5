"""Recordings: encrypted, chained, signed event files (``docs/recording-format.md`` has every byte).

============  ==========================================================================================
``format``    the structures and their bytes: header, chain, head, trailer; no I/O
``writer``    PartWriter: events to framed bytes; the caller writes them
``scan``      Scan: walks a file's chunks along the chain; what reader, verifier and recovery share
``reader``    PartReader: decrypts with a recipient's private key and gives the events, bounded
``verify``    verify_part: checks chain, signature and witnessed heads with public keys only
============  ==========================================================================================
"""

from pam_common.recording.format import (
    Head,
    Header,
    Recipient,
    RecordingError,
    parse_part_name,
    part_name,
)
from pam_common.recording.reader import NoRecipientError, PartReader
from pam_common.recording.verify import StatementTrust, VerifyReport, chain_heads, verify_part
from pam_common.recording.writer import PartWriter

__all__ = [
    "Head",
    "Header",
    "NoRecipientError",
    "PartReader",
    "PartWriter",
    "Recipient",
    "RecordingError",
    "StatementTrust",
    "VerifyReport",
    "chain_heads",
    "parse_part_name",
    "part_name",
    "verify_part",
]
