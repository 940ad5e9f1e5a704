"""How functions, arguments and results cross between processes.

Plain pickle is several times faster than cloudpickle and does for most values. But it sends what is defined in
``__main__`` by name, and the child's ``__main__`` is another; and it refuses lambdas and local classes. Both go by
value, with cloudpickle.
"""

from __future__ import annotations

import pickle
from typing import Any, Final

__all__ = ["PicklingFailed", "dumps", "dumps_together", "explain", "is_plain"]

_PROTOCOL: Final = 5
_PLAIN: Final = frozenset({int, float, str, bool, type(None)})


class PicklingFailed(Exception):  # noqa: N818 - never shown: its message becomes that of a job's error
    """A value cannot be sent; the message is a path to the object that is to blame."""


def is_plain(value: Any) -> bool:
    """Whether a value is a scalar or a dict of scalars: such values cannot fail to be sent, nor share anything."""
    kind = type(value)
    if kind in _PLAIN:
        return True
    if kind is not dict:
        return False
    for key, item in value.items():  # noqa: SIM110 - a generator would cost twice as much, for each job
        if type(item) not in _PLAIN or type(key) not in _PLAIN:
            return False
    return True


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
        if b"__main__" not in data:
            return data
    except BaseException:  # noqa: BLE001, S110 - a lambda, say; cloudpickle knows more, and tells why if it does not
        pass
    import cloudpickle  # here: most children never need it

    try:
        data = cloudpickle.dumps(value, _PROTOCOL)
    except BaseException as exc:  # users' code, which may even call sys.exit
        raise PicklingFailed(explain(value, name, exc)) from exc
    return bytes(data)


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
    path, part, reason = _blame(value, name, exc, depth=0, seen=set())
    return f"{path} cannot be pickled: {type(part).__name__} object ({type(reason).__name__}: {reason})"


def _blame(value: Any, path: str, exc: BaseException, *, depth: int, seen: set[int]) -> tuple[str, Any, BaseException]:
    """Follow what cannot be pickled down to the smallest part that cannot."""
    if depth > 20:  # noqa: PLR2004 - deep enough for any path a person would read
        return path, value, exc
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
    return path, value, exc


def _failure(value: Any) -> BaseException | None:
    import cloudpickle  # as above

    try:
        cloudpickle.dumps(value, _PROTOCOL)
    except BaseException as exc:  # noqa: BLE001 - a __reduce__ may raise anything
        return exc
    return None


def _parts(value: Any) -> list[tuple[str, Any]]:  # noqa: C901 - one short question for each kind of object
    if isinstance(value, dict):
        return [(f"[{key!r}]", item) for key, item in value.items()]
    if isinstance(value, list | tuple | set | frozenset):
        return [(f"[{index}]", item) for index, item in enumerate(value)]
    parts: list[tuple[str, Any]] = []
    if callable(value) and hasattr(value, "__code__"):
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
        parts += [(f" (its global {name!r})", known[name]) for name in value.__code__.co_names if name in known]
    if hasattr(value, "func") and hasattr(value, "args") and hasattr(value, "keywords"):  # functools.partial
        parts += [(".func", value.func), (".args", value.args), (".keywords", value.keywords)]
    if hasattr(value, "__self__") and not isinstance(value, type):
        parts.append((".__self__", value.__self__))
    attributes = getattr(value, "__dict__", None)
    if isinstance(attributes, dict) and not isinstance(value, type) and not hasattr(value, "__code__"):
        parts += [(f".{name}", item) for name, item in attributes.items()]
    for cls in type(value).__mro__:
        for name in getattr(cls, "__slots__", ()):
            if isinstance(name, str) and name != "__dict__" and hasattr(value, name):
                parts.append((f".{name}", getattr(value, name)))
    return parts
