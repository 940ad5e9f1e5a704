"""TARGET on the command line: from ``path/to/file.py:function`` or ``package.module:function`` to the run-function."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from paraval.errors import BadValueError

__all__ = ["check_call", "file_of", "load_target"]

RunFunction = Callable[..., Any]

NAMED: Final = 8
"""How many functions of a module are named when the wanted one is not there."""


def load_target(target: str) -> RunFunction:
    """Import the run-function that TARGET names.

    The directory of a file goes to the front of ``sys.path``, as ``python file.py`` would do it, and the file becomes
    the module named like it; for a module the current directory does, as under ``python -m``. The name after the colon
    may be dotted. A class that has ``__call__`` is instantiated without arguments.

    Raises:
        BadValueError: nothing callable is there; one line says what was wrong.
    """
    place, _, name = target.rpartition(":")
    if not place or not all(part.isidentifier() for part in name.split(".")):
        raise BadValueError(f"TARGET '{target}' must be path/to/file.py:function or package.module:function")
    module = _import_file(target, Path(place)) if _is_path(place) else _import_module(target, place)
    return _callable(target, _attribute(target, module, name))


def check_call(target: str, run_function: RunFunction, kwargs: Mapping[str, Any]) -> None:
    """Make sure that ``run_function(job, **kwargs)`` can be called, before the first job finds out.

    Raises:
        BadValueError: it cannot; one line says why.
    """
    try:
        signature = inspect.signature(run_function)
    except (TypeError, ValueError):  # some callables written in C do not say
        return
    try:
        signature.bind(object(), **kwargs)
    except TypeError as exc:
        call = ", ".join(["job", *(f"{key}=…" for key in kwargs)])
        name = target.rpartition(":")[2]
        raise BadValueError(
            f"TARGET '{target}' cannot be called as {name}({call}): {exc} "
            f"(its signature is {name}{signature}; --set KEY=VALUE gives further arguments)"
        ) from None


def file_of(run_function: RunFunction) -> str | None:
    """Name the file that a run-function was imported from; None where that is not known."""
    module = sys.modules.get(str(getattr(run_function, "__module__", None)))
    file = getattr(module, "__file__", None)
    return file if isinstance(file, str) else None


def _is_path(place: str) -> bool:
    return place.endswith(".py") or "/" in place or os.sep in place


def _import_file(target: str, path: Path) -> ModuleType:
    if not path.exists():
        with_suffix = Path(f"{path}.py")
        near = [str(with_suffix)] if with_suffix.is_file() else _close(path.name, _python_files(path.parent))
        raise BadValueError(f"TARGET '{target}': no such file: {path}{_did_you_mean(near)}")
    if not path.is_file():
        raise BadValueError(f"TARGET '{target}': {path} is not a file")
    path = path.resolve()
    name = path.stem
    loaded = sys.modules.get(name)
    if loaded is not None:
        # Two modules of one name would let a worker process, or a pickle, find the wrong one.
        other = getattr(loaded, "__file__", None) or "built in"
        if other != str(path):
            raise BadValueError(
                f"TARGET '{target}': a module named '{name}' is loaded already ({other}): rename {path.name}"
            )
        return loaded
    _prepend_to_path(str(path.parent))
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise BadValueError(f"TARGET '{target}': {path.name} is no Python file (its name must end with .py)")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except KeyboardInterrupt:
        raise
    except BaseException as exc:  # whatever the user's file raises, sys.exit() included
        sys.modules.pop(name, None)
        raise BadValueError(_import_raised(target, path.name, exc, str(path))) from exc
    return module


def _import_module(target: str, name: str) -> ModuleType:
    _prepend_to_path(str(Path.cwd()))
    try:
        return importlib.import_module(name)
    except KeyboardInterrupt:
        raise
    except BaseException as exc:  # whatever the user's module raises, sys.exit() included
        if isinstance(exc, ModuleNotFoundError) and exc.name and f"{name}.".startswith(f"{exc.name}."):
            near = [f"{name}.py"] if Path(f"{name}.py").is_file() else []
            raise BadValueError(f"TARGET '{target}': no module named '{exc.name}'{_did_you_mean(near)}") from None
        raise BadValueError(_import_raised(target, name, exc)) from exc


def _attribute(target: str, module: ModuleType, dotted: str) -> Any:
    found: Any = module
    for name in dotted.split("."):
        try:
            found = getattr(found, name)
        except AttributeError:
            where = getattr(found, "__name__", type(found).__name__)
            functions = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
            own = [key for key in functions if getattr(vars(module)[key], "__module__", None) == module.__name__]
            hint = _did_you_mean(_close(name, functions))
            if not hint and own:
                hint = f" (it has {', '.join(own[:NAMED])}{', …' if len(own) > NAMED else ''})"
            raise BadValueError(f"TARGET '{target}': no '{name}' in {where}{hint}") from None
    return found


def _callable(target: str, found: Any) -> RunFunction:
    if inspect.isclass(found):
        if "__call__" not in dir(found):  # dir() leaves out what the metaclass brings: that makes instances
            raise BadValueError(f"TARGET '{target}' is a class without __call__, not a function")
        try:
            found = found()
        except Exception as exc:
            raise BadValueError(
                f"TARGET '{target}' is a class, and making it without arguments raised {_one_line(exc)}"
            ) from exc
    if not callable(found):
        raise BadValueError(f"TARGET '{target}' is not callable: it is of type {type(found).__name__}")
    run_function: RunFunction = found
    return run_function


def _import_raised(target: str, where: str, exc: BaseException, file: str | None = None) -> str:
    frames = [frame for frame in traceback.extract_tb(exc.__traceback__) if "importlib" not in frame.filename]
    frames = [frame for frame in frames if frame.filename != __file__]
    # The line of the user's own file, if it came so far (a syntax error names file and line itself).
    frames = [frame for frame in frames if frame.filename == file] or frames
    at = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return f"TARGET '{target}': importing {where} raised {_one_line(exc)}{at}"


def _one_line(exc: BaseException) -> str:
    message = "; ".join(line.strip() for line in str(exc).splitlines() if line.strip())
    return f"{type(exc).__name__}: {message}" if message else type(exc).__name__


def _prepend_to_path(directory: str) -> None:
    if sys.path[:1] != [directory]:
        sys.path.insert(0, directory)


def _python_files(directory: Path) -> list[str]:
    return [path.name for path in directory.glob("*.py")] if directory.is_dir() else []


def _close(name: str, names: Iterable[str]) -> list[str]:
    return difflib.get_close_matches(name, list(names), n=3)


def _did_you_mean(names: list[str]) -> str:
    return f" (did you mean {' or '.join(names)}?)" if names else ""
