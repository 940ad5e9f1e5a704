"""How functions, arguments and results cross between processes.

Plain pickle is several times faster than cloudpickle and does for most values. But it sends what is defined in
``__main__`` by name, and the child's ``__main__`` is another; and it refuses lambdas and local classes. Both go by
value, with cloudpickle.
"""

from __future__ import annotations

import functools
import gc
import io
import itertools
import math
import pickle
import sys
from abc import ABCMeta
from collections.abc import Callable, Sequence
from types import FunctionType, MemberDescriptorType
from typing import Any, Final

__all__ = [
    "PicklingFailed",
    "PiecewisePickler",
    "TooLargeError",
    "are_plain_dicts",
    "dumps",
    "dumps_together",
    "explain",
    "is_plain",
    "loads_in_pieces",
]

_MP_MAIN: Final = "__mp_main__"
"""What the program's script is called in a process that multiprocessing has started, but with fork."""
_MAINS: Final = frozenset({"__main__", _MP_MAIN})
_MAIN: Final = b"_main__"
"""What the pickle of anything of theirs by name contains."""
_PROTOCOL: Final = 5
_PIECE: Final = 1 << 20
_MANY: Final = 1000
_PLAIN: Final = frozenset({int, float, str, bool, type(None)})
"""The types of scalars: none of them can fail to be sent."""


class PicklingFailed(Exception):  # noqa: N818 - never shown: its message becomes that of a job's error
    """A value cannot be sent; the message is a path to the object that is to blame."""


class TooLargeError(Exception):
    """A value takes more bytes than it may."""


def is_plain(value: Any) -> bool:
    """Whether a value is a scalar or a small dict of scalars: it cannot fail to be sent, nor share anything."""
    kind = type(value)
    try:
        if kind in _PLAIN:
            return True
        if kind is not dict or len(value) > _MANY:
            return False
        for key, item in value.items():
            if type(item) not in _PLAIN or type(key) not in _PLAIN:
                return False
    except Exception:  # noqa: BLE001 - a type that has no hash, as its metaclass wants it
        return False
    return True


def are_plain_dicts(values: Sequence[Any]) -> bool:
    """Whether all are small dicts of scalars; as :func:`is_plain` for each, at half its cost."""
    try:
        return (
            {dict}.issuperset(map(type, values))
            and max(map(len, values), default=0) <= _MANY
            and _PLAIN.issuperset(map(type, itertools.chain.from_iterable(values)))
            and _PLAIN.issuperset(map(type, itertools.chain.from_iterable(map(dict.values, values))))
        )
    except Exception:  # noqa: BLE001 - as in is_plain
        return False


def dumps(value: Any, name: str) -> bytes:
    """Pickle a value, by value where by name would not do.

    Args:
        value: anything.
        name: what it is called in the message, as ``"argument"``.

    Raises:
        PicklingFailed: it cannot be pickled.
    """
    try:
        data = pickle.dumps(value, _PROTOCOL)
        if _MAIN not in data:
            return data
    except BaseException:  # noqa: BLE001, S110 - a lambda, say; cloudpickle knows more, and tells why if it does not
        pass
    pieces = io.BytesIO()
    try:
        _by_value(pieces).dump(value)
    except BaseException as exc:  # users' code, which may even call sys.exit
        raise PicklingFailed(explain(value, name, exc)) from exc
    return pieces.getvalue()


def _by_value(file: Any) -> Any:
    """Make a pickler that sends what is defined in ``__main__`` by value."""
    return _class_by_value()(file, _PROTOCOL)


@functools.cache
def _class_by_value() -> Any:
    import cloudpickle  # here: most children never need it

    if (script := sys.modules.get(_MP_MAIN)) is not None:
        cloudpickle.register_pickle_by_value(script)

    class ByValue(cloudpickle.Pickler):  # type: ignore[misc] # it has no types
        def reducer_override(self, thing: Any) -> Any:
            # cloudpickle sends what functools.lru_cache makes of a function by name. __wrapped__ may have been changed
            # since: it is the function if the object itself refers to it.
            if (
                type(thing) is _CACHED
                and getattr(thing, "__module__", None) in _MAINS
                and any(it is thing.__wrapped__ for it in gc.get_referents(thing))
            ):
                notes = {name: value for name, value in vars(thing).items() if name not in _OF_CACHED}
                return _cached, (thing.__wrapped__, thing.cache_parameters()), notes
            reduced = super().reducer_override(thing)
            if isinstance(thing, type) and "__slots__" in vars(thing) and reduced is not NotImplemented:
                return _with_slots(reduced, thing)
            return reduced

    return ByValue


def _with_slots(reduced: Any, cls: type) -> Any:
    """Have a class that goes by value made with its slots.

    cloudpickle makes it without, so that its objects get a dict there, which those of the same class here cannot take.
    """
    make, args, *rest = reduced
    slots = vars(cls)["__slots__"]
    if isinstance(slots, str):
        slots = (slots,)
    if make.__name__ != "_make_skeleton_class" or not _is_made_with(cls, slots):
        return reduced
    *before, namespace, tracker, extra = args
    return (make, (*before, {**namespace, "__slots__": tuple(slots)}, tracker, extra), *rest)


def _is_made_with(cls: type, slots: Any) -> bool:
    """Whether to be made with these slots is all that it takes to have them; they may also be a note, or another's."""
    if not isinstance(slots, tuple | list | dict | set | frozenset) or type(cls).__new__ not in _PLAINLY_MADE:
        return False  # an iterator, which is empty by now; or a metaclass makes them, or wants none
    if any(isinstance(base, FunctionType) for base in vars(cls).get("__orig_bases__", ())):  # typing.NamedTuple is one
        return False
    private = f"_{cls.__name__.lstrip('_')}__"
    names = [private + name[2:] if name[:2] == "__" != name[-2:] else name for name in slots if name not in _SPECIAL]
    has_dict = "__dict__" in vars(cls)
    return has_dict == ("__dict__" in slots) and all(type(vars(cls).get(it)) is MemberDescriptorType for it in names)


_PLAINLY_MADE: Final = (type.__new__, ABCMeta.__new__)
_SPECIAL: Final = frozenset({"__dict__", "__weakref__"})


_CACHED: Final = type(functools.lru_cache(print))
_OF_CACHED: Final = frozenset({*functools.WRAPPER_ASSIGNMENTS, "__wrapped__", "cache_parameters"})


def _cached(function: Callable[..., Any], parameters: dict[str, Any]) -> Any:
    """Make what :func:`functools.lru_cache` makes of a function, with nothing in it yet."""
    return functools.lru_cache(**parameters)(function)


class PiecewisePickler:
    """Pickles one value after the other so that other threads can run meanwhile, and no further than to a limit.

    The pickler lets nobody else run but where it calls Python: so each piece of 64 KiB is given to a function here. It
    is made once, as that takes as long as to pickle something small. Not for two threads at a time.
    """

    def __init__(self) -> None:
        self._pieces = _Pieces()
        self._pickler = pickle.Pickler(self._pieces, _PROTOCOL)

    def dumps(self, value: Any, name: str, most: float = math.inf) -> bytes:
        """Pickle a value as the function of that name does.

        Args:
            value: anything.
            name: what it is called in the message.
            most: how many bytes it may take.

        Raises:
            PicklingFailed: it cannot be pickled.
            TooLargeError: it takes more bytes.
        """
        pieces = self._pieces
        pieces.begin(most)
        try:
            self._pickler.dump(value)
            data = pieces.joined()
            if not _names_main(data):
                return data
        except TooLargeError:
            raise
        except BaseException:  # noqa: BLE001, S110 - as in dumps
            pass
        finally:
            self._pickler.clear_memo()
        pieces.begin(most)
        try:
            _by_value(pieces).dump(value)
        except TooLargeError:
            raise
        except BaseException as exc:  # as above
            raise PicklingFailed(explain(value, name, exc)) from exc
        return pieces.joined()


def loads_in_pieces(data: bytes | memoryview) -> Any:
    """Unpickle a value of our own or of our own worker, so that other threads can run meanwhile."""
    return pickle.Unpickler(_Source(memoryview(data))).load()  # noqa: S301 - see above


class _Pieces:
    """What a pickler has written."""

    __slots__ = ("_pieces", "_room")

    def begin(self, room: float) -> None:
        self._pieces: list[bytes] = []
        self._room = room

    def write(self, data: bytes | bytearray | memoryview | pickle.PickleBuffer) -> None:
        if type(data) is not bytes:  # the memory of a large object, which may be another's soon
            self._write_memory(data.raw() if isinstance(data, pickle.PickleBuffer) else memoryview(data).cast("B"))
            return
        self._room -= len(data)
        if self._room < 0:
            raise TooLargeError
        self._pieces.append(data)

    def _write_memory(self, view: memoryview) -> None:
        self._room -= len(view)
        if self._room < 0:
            raise TooLargeError
        self._pieces += [bytes(view[begin : begin + _PIECE]) for begin in range(0, len(view), _PIECE)]

    def joined(self) -> bytes:
        pieces, self._pieces = self._pieces, []
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _names_main(data: bytes) -> bool:
    if len(data) <= _PIECE:
        return _MAIN in data
    windows = range(0, len(data), _PIECE)
    return any(data.find(_MAIN, begin, begin + _PIECE + 8) >= 0 for begin in windows)


class _Source:
    """What an unpickler reads."""

    __slots__ = ("_at", "_view")

    def __init__(self, view: memoryview) -> None:
        self._view = view
        self._at = 0

    def read(self, size: int) -> bytes:
        data = bytes(self._view[self._at : self._at + size])
        self._at += len(data)
        return data

    def readline(self) -> bytes:
        raise pickle.UnpicklingError("this protocol has no lines")

    def readinto(self, target: memoryview) -> int:
        size = len(target)
        for begin in range(0, size, _PIECE):
            end = min(begin + _PIECE, size)
            target[begin:end] = self._view[self._at + begin : self._at + end]
        self._at += size
        return size


def dumps_together(parts: dict[str, Any]) -> bytes:
    """Pickle values as one tuple: what they share is shared where they arrive, the globals of ``__main__`` too.

    Args:
        parts: the values, by what they are called in the message.

    Raises:
        PicklingFailed: one cannot be pickled; the message names it.
    """
    try:
        return dumps(tuple(parts.values()), "what is sent")
    except PicklingFailed:
        for name, part in parts.items():
            dumps(part, name)
        raise


def explain(value: Any, name: str, exc: BaseException) -> str:
    """Say which part of a value cannot be pickled, as a path to it."""
    path, part, reason, depth = _blame(value, name, exc, depth=0, seen=set())
    said = f"{type(reason).__name__}: {_said(reason)}"
    if depth > _DEEPEST and (isinstance(reason, RecursionError) or "deep recursion" in said):
        return f"{name} cannot be pickled: it is nested too deeply ({said})"
    return f"{path} cannot be pickled: {type(part).__name__} object ({said})"


def _said(exc: BaseException) -> str:
    try:
        return str(exc)
    except BaseException:  # noqa: BLE001 - a user's __str__
        return "and it cannot be said why"


_DEEPEST: Final = 20
"""Deep enough for any path that a person would read."""


def _blame(
    value: Any, path: str, exc: BaseException, *, depth: int, seen: set[int]
) -> tuple[str, Any, BaseException, int]:
    """Follow what cannot be pickled down to the smallest part that cannot."""
    if depth > _DEEPEST:
        return path, value, exc, depth
    seen.add(id(value))
    try:
        parts = _parts(value)
    except Exception:  # noqa: BLE001 - an object whose attributes raise shows none of them
        parts = []
    for name, part in parts:
        if id(part) in seen:
            continue
        found = _failure(part)
        if found is not None:
            return _blame(part, f"{path}{name}", found, depth=depth + 1, seen=seen)
    return path, value, exc, depth


def _failure(value: Any) -> BaseException | None:
    try:
        _by_value(io.BytesIO()).dump(value)
    except BaseException as exc:  # noqa: BLE001 - a __reduce__ may raise anything
        return exc
    return None


def _parts(value: Any) -> list[tuple[str, Any]]:  # noqa: C901 - one short question for each kind of object
    if isinstance(value, dict):
        return [(f"[{key!r}]", item) for key, item in value.items()]
    if isinstance(value, list | tuple | set | frozenset):
        return [(f"[{index}]", item) for index, item in enumerate(value)]
    if isinstance(value, type):
        return _parts_of_class(value)
    is_function = callable(value) and hasattr(value, "__code__")
    parts = _parts_of_function(value) if is_function else []
    if hasattr(value, "func") and hasattr(value, "args") and hasattr(value, "keywords"):  # functools.partial
        parts += [(".func", value.func), (".args", value.args), (".keywords", value.keywords)]
    if hasattr(value, "__self__"):
        parts.append((".__self__", value.__self__))
    attributes = getattr(value, "__dict__", None)
    if isinstance(attributes, dict) and not is_function:
        parts += [(f".{name}", item) for name, item in attributes.items()]
    for cls in type(value).__mro__:
        for name in getattr(cls, "__slots__", ()):
            if isinstance(name, str) and name != "__dict__" and hasattr(value, name):
                parts.append((f".{name}", getattr(value, name)))
    if _goes_by_value(type(value)):
        parts.append((f" (its class {type(value).__name__!r})", type(value)))
    return parts


def _parts_of_function(value: Any) -> list[tuple[str, Any]]:
    parts: list[tuple[str, Any]] = []
    cells = getattr(value, "__closure__", None) or ()
    for name, cell in zip(value.__code__.co_freevars, cells, strict=False):
        try:
            parts.append((f" (its variable {name!r})", cell.cell_contents))
        except ValueError:  # the cell is empty
            continue
    parts += [(f" (its default {index})", item) for index, item in enumerate(value.__defaults__ or ())]
    parts += [(f" (its default {name!r})", item) for name, item in (value.__kwdefaults__ or {}).items()]
    if hasattr(value, "__wrapped__"):  # functools.wraps
        parts.append((" (decorated)", value.__wrapped__))
    known = getattr(value, "__globals__", {})
    return parts + [(f" (its global {name!r})", known[name]) for name in value.__code__.co_names if name in known]


def _parts_of_class(cls: type) -> list[tuple[str, Any]]:
    if not _goes_by_value(cls):
        return []
    bases = [(f" (its base {base.__name__!r})", base) for base in cls.__bases__ if _goes_by_value(base)]
    return bases + [(f".{name}", item) for name, item in vars(cls).items() if name not in _OF_CLASSES]


def _goes_by_value(cls: type) -> bool:
    return cls.__module__ in _MAINS or "<locals>" in cls.__qualname__


_OF_CLASSES: Final = frozenset({"__dict__", "__weakref__", "__module__", "__doc__", "__slots__"})
