"""Values as bytes, and what they are recognised by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import msgspec

from paraval.errors import CorruptStoreError
from paraval.storage.codec.plain import Plain, encoder, is_plain, read_ext, sorting_encoder

__all__ = ["UNSEEN", "decode", "decoded", "encode", "key_of"]

UNSEEN: Final = (OverflowError, UnicodeEncodeError, TypeError)
"""What the encoder raises at what a quick look does not see: an int of more than 64 bits or half a character, which are
written as extension types; UNSET, which is plain as a field of a struct, but not deeper."""


def encode(value: Any, what: str) -> bytes:
    """Write a value as bytes.

    None, bool, int of any size, float (NaN and infinities too), str, bytes, list, dict (with any keys that can be kept)
    and datetime come back as they are. So that nobody's result is lost over a detail, a tuple comes back as a list, a
    set as a sorted list, a bytearray as bytes, an Enum as its value, a path, a Decimal or a UUID as its text, a date or
    time in ISO form, a timedelta in seconds, a dataclass or msgspec Struct as a dict, a NumPy scalar or array as
    numbers.

    Args:
        value: what to write.
        what: what it is, for the message, as ``"output"``.

    Raises:
        UnstorableError: there is something else in it; the message gives the way to it.
    """
    if is_plain(value):
        try:
            return encoder.encode(value)
        except UNSEEN:
            pass
    return encoder.encode(Plain(what).of(value))


def decode(data: bytes | bytearray) -> Any:
    """Read what :func:`encode` wrote.

    Raises:
        CorruptStoreError: it wrote nothing like this.
    """
    return decoded(_decoder, data)


def key_of(function: str | None, args: Mapping[str, Any]) -> bytes:
    """Give the key under which a configuration of a run-function is recognised again.

    Two keys are equal when the configurations are, whether or not they have been stored and read since: the order of
    keys means nothing, nor does list or tuple, Python's number or NumPy's, Enum or its value. 1, 1.0 and True differ:
    to a run-function they may mean different things, and a result that is wrongly taken over does more harm than a job
    that is run again.

    Raises:
        UnstorableError: there is something in the configuration that cannot be stored, so it has no key.
    """
    try:
        if is_plain(args):
            return sorting_encoder.encode((function, args))
    except UNSEEN:
        pass  # and the encoder sorts no keys but str
    plain = Plain("configuration", canonical=True)
    return sorting_encoder.encode((plain.of(function), plain.of(args)))


def decoded(decoder: msgspec.msgpack.Decoder[Any], data: bytes | bytearray) -> Any:
    """Read what an encoder wrote.

    Raises:
        CorruptStoreError: it wrote nothing like this.
    """
    try:
        return decoder.decode(data)
    except (msgspec.MsgspecError, ValueError, TypeError, RecursionError, MemoryError) as exc:
        # Damaged data may hold anything: what is no value for its type, a million brackets, a list of four billion.
        raise CorruptStoreError(f"stored bytes cannot be read ({exc}): {bytes(memoryview(data)[:32])!r}…") from exc


_decoder: Final = msgspec.msgpack.Decoder(ext_hook=read_ext)
