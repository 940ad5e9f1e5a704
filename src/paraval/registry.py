"""The evaluation methods by name: our own, and those of third parties (entry points in ``paraval.evaluators``)."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from paraval.errors import BadValueError, MissingExtraError, WrongTypeError
from paraval.functions import is_async

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

    from paraval.evaluator import Evaluator

__all__ = ["Method", "default_method", "method", "methods", "refuse_unknown"]


@dataclass(frozen=True)
class Method:
    """One way to run jobs.

    Attributes:
        name: what ``Evaluator.create`` takes.
        missing: None when it can be used here; else what to do about it.
        load: gives the evaluator class.
        argument: an argument that it cannot do without and that only a program can give; None when there is none.
    """

    name: str
    missing: str | None
    load: Callable[[], type[Evaluator]]
    argument: str | None = None

    @property
    def summary(self) -> str:
        """What it does, in one line; of a method that cannot be loaded here, nothing is known."""
        doc = self._of_class("__doc__")
        return str(doc).strip().splitlines()[0] if doc else ""

    @property
    def parallel(self) -> str:
        """What runs side by side."""
        return str(self._of_class("parallel") or "?")

    @property
    def cancellation(self) -> str:
        """What can be done to a running job."""
        return str(self._of_class("cancellation") or "?")

    @property
    def closures(self) -> bool:
        """Whether lambdas and local functions can be run-functions."""
        return bool(self._of_class("closures"))

    @property
    def several_hosts(self) -> bool:
        """Whether jobs can run on other machines."""
        return bool(self._of_class("several_hosts"))

    def _of_class(self, attribute: str) -> Any:
        return getattr(self.load(), attribute, None) if self.missing is None else None

    @property
    def label(self) -> str:
        """The name, marked when the method cannot be used here."""
        return self.name if self.missing is None else f"{self.name} (needs: {self.missing})"


@dataclass(frozen=True)
class _BuiltIn:
    """Where a method of ours is, the import that its extra brings, and the argument that it needs."""

    module: str
    cls: str
    requires: str | None = None
    extra: str | None = None
    argument: str | None = None


# Weakest first among the local methods that take a plain function; `default_method` takes the last that is ready.
_BUILT_IN: Final = {
    "serial": _BuiltIn("paraval.backends.serial", "SerialEvaluator"),
    "thread": _BuiltIn("paraval.backends.thread", "ThreadPoolEvaluator"),
    "process": _BuiltIn("paraval.backends.process", "ProcessPoolEvaluator"),
    "loky": _BuiltIn("paraval.backends.loky", "LokyEvaluator", requires="loky", extra="loky"),
    "executor": _BuiltIn("paraval.backends.executor", "ExecutorEvaluator", argument="executor"),
}
_LOCAL: Final = ("thread", "process")
_GROUP: Final = "paraval.evaluators"


def methods() -> dict[str, Method]:
    """Give every known method, ours first. It imports what other packages have registered."""
    found = {name: _own(name, where) for name, where in _BUILT_IN.items()}
    for name, entry in _entries().items():
        found.setdefault(name, _foreign(entry))
    return found


def method(name: str) -> Method:
    """Give the method of this name, ready to load.

    Raises:
        ValueError: there is none.
        ImportError: what it needs is not installed.
    """
    found = None
    if isinstance(name, str):
        found = _own(name, _BUILT_IN[name]) if name in _BUILT_IN else None
        if found is None and name in (entries := _entries()):
            found = _foreign(entries[name])
    if found is None:
        valid = ", ".join(known.label for known in methods().values())
        raise BadValueError(f"unknown method {name!r}; the methods are: {valid}")
    if found.missing is not None:
        raise MissingExtraError(f"method {name!r} cannot be used here; it needs: {found.missing}")
    return found


def _entries() -> dict[str, EntryPoint]:
    from importlib.metadata import entry_points  # here: it takes a while to import, and only this needs it

    return {entry.name: entry for entry in entry_points(group=_GROUP)}


def default_method(run_function: Callable[..., Any]) -> str:
    """Name the method for a function when none is asked for: serial for a coroutine, else the strongest local one."""
    if is_async(run_function):
        return "serial"
    known = methods()
    return [name for name in _LOCAL if known[name].missing is None][-1]


def _own(name: str, where: _BuiltIn) -> Method:
    missing = None
    if where.requires is not None and importlib.util.find_spec(where.requires) is None:
        missing = f"pip install 'paraval[{where.extra}]'"

    def load() -> type[Evaluator]:
        cls: type[Evaluator] = getattr(importlib.import_module(where.module), where.cls)
        return cls

    return Method(name, missing, load, where.argument)


def _foreign(entry: EntryPoint) -> Method:
    def load() -> type[Evaluator]:
        cls: type[Evaluator] = entry.load()
        return cls

    try:
        cls: object = load()
    except (Exception, SystemExit) as exc:  # noqa: BLE001 - another package's module may fail to import in any way
        return Method(entry.name, f"{entry.value} cannot be imported: {type(exc).__name__}: {exc}", load)
    if not isinstance(cls, type):
        return Method(entry.name, f"{entry.value} to be an evaluator class; it is {cls!r}", load)
    return Method(entry.name, None, load)


def refuse_unknown(cls: type[Evaluator], names: Iterable[str]) -> None:
    """Refuse what is no argument of an evaluator class.

    Raises:
        TypeError: it names the argument, and what may have been meant.
    """
    import difflib  # here: it is seldom needed

    known: list[str] = []
    for base in cls.__mro__:
        if "__init__" not in vars(base):
            continue
        parameters = inspect.signature(vars(base)["__init__"]).parameters.values()
        known += [
            one.name for one in parameters if one.kind in _BY_NAME and one.name not in {"self", "run_function", *known}
        ]
        if not any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters):
            break  # nothing goes on to the classes that it is derived from
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            right = f"did you mean {close[0]!r}?" if close else f"it takes {', '.join(known)}"
            raise WrongTypeError(f"{cls.__name__} has no argument {name!r}: {right}")


_BY_NAME: Final = frozenset({inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY})
