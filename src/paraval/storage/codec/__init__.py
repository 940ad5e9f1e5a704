"""How values and records are written at rest: MessagePack, never pickle, so that reading them cannot run anything."""

from paraval.storage.codec.changes import (
    decode_change,
    decode_changes,
    decode_ends,
    encode_change,
    encode_changes,
    encode_each_change,
    encode_ends,
)
from paraval.storage.codec.fields import decode_error, encode_error
from paraval.storage.codec.records import (
    decode_record,
    decode_records,
    encode_each_record,
    encode_record,
    encode_records,
)
from paraval.storage.codec.values import decode, encode, key_of

__all__ = [
    "decode",
    "decode_change",
    "decode_changes",
    "decode_ends",
    "decode_error",
    "decode_record",
    "decode_records",
    "encode",
    "encode_change",
    "encode_changes",
    "encode_each_change",
    "encode_each_record",
    "encode_ends",
    "encode_error",
    "encode_record",
    "encode_records",
    "key_of",
]
