"""Values as text: what a subprocess prints as its result, and what JSON has no words for."""

from __future__ import annotations

import ast
import inspect
import json
import math
import re
import uuid
from typing import Any, Final

from paraval.errors import BadValueError, ParavalError
from paraval.outcome import FAILURE

__all__ = ["NoOutputError", "parse_subprocess_result", "to_json"]

_OUTPUT: Final = re.compile(r"DH-OUTPUT:[^\S\n]*(\S.*)")
_NUMPY_SCALAR: Final = re.compile(r"(float|int|uint|bool|str|longdouble)[0-9_]*")
_NAMES: Final = {
    "true": True,
    "false": False,
    "null": None,
    "nan": math.nan,
    "NaN": math.nan,
    "inf": math.inf,
    "Infinity": math.inf,
}


class NoOutputError(ParavalError, RuntimeError):
    """A subprocess printed no result; the message holds what it wrote to its standard error."""


def parse_subprocess_result(result: Any) -> Any:
    """Read the result that a subprocess has printed as ``DH-OUTPUT:value``.

    The value may be JSON or what Python's ``print`` makes of numbers, strings, lists, tuples, dicts, None and booleans,
    NaN and infinities and NumPy's scalars included. A failure may stand without quotes: ``DH-OUTPUT:F_out_of_memory``.

    Args:
        result: what ``subprocess.run`` returned, its ``stdout`` captured as bytes or text. The first result counts.

    Returns:
        The value.

    Raises:
        RuntimeError: there is no result; the message holds the subprocess's standard error.
        ValueError: what was printed is no value.
    """
    found = _OUTPUT.search(_text(result.stdout))
    if found is None:
        code = getattr(result, "returncode", None)
        ended = "" if code is None else f" (it ended with code {code})"
        said = _text(result.stderr).strip()
        raise NoOutputError(
            f"the subprocess printed no line 'DH-OUTPUT:…'{ended}; its standard error:\n{said}"
            if said
            else f"the subprocess printed no line 'DH-OUTPUT:…'{ended}, and nothing on its standard error"
        )
    return _value(found.group(1).strip())


def to_json(d: Any) -> str:
    """Write a value as JSON: UUIDs as text, NumPy's values as Python's, functions and classes as ``"module.name"``.

    Raises:
        TypeError: something in it has no form in JSON.
    """
    return json.dumps(d, default=_jsonable)


def _text(printed: bytes | str | None) -> str:
    if printed is None:
        return ""
    return printed if isinstance(printed, str) else bytes(printed).decode("utf-8", errors="replace")


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    try:
        tree = ast.parse(text, mode="eval")
        return ast.literal_eval(_Spelling().visit(tree))
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):  # the last two: nested too deep to parse
        pass
    # A string in quotes of a kind that is also within it, or without any: "F_can't".
    bare = text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" else text
    if bare.startswith(FAILURE):
        return bare
    raise BadValueError(f"the subprocess printed as its result what is neither JSON nor a Python value: {text[:200]!r}")


class _Spelling(ast.NodeTransformer):
    """Puts Python's literals for what is printed otherwise: ``nan``, ``true``, ``np.float64(0.5)``."""

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return ast.Constant(_NAMES[node.id]) if node.id in _NAMES else node

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        match node:
            case ast.Attribute(value=ast.Name(id="np" | "numpy"), attr="True_" | "False_" as name):
                return ast.Constant(name == "True_")
        return node

    def visit_Call(self, node: ast.Call) -> ast.expr:
        match node:
            case ast.Call(func=ast.Attribute(value=ast.Name(id="np" | "numpy"), attr=name), args=[value], keywords=[]):
                if _NUMPY_SCALAR.fullmatch(name):
                    return self.visit(value)  # type: ignore[no-any-return] # the stubs know of nodes only
        return node


def _jsonable(value: Any) -> Any:
    if isinstance(value, uuid.UUID):
        return str(value)
    if inspect.isclass(value) or inspect.isroutine(value):
        return f"{value.__module__}.{value.__name__}"
    if type(value).__module__ == "numpy" and hasattr(value, "tolist"):  # an array or a scalar
        return value.tolist()
    raise TypeError(f"{type(value).__name__} has no form in JSON: {value!r}")
