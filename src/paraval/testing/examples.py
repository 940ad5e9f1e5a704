"""What the suite stores: values that a careless storage would change, and a job as it is when it is new."""

from __future__ import annotations

import math
from typing import Any, Final

from paraval.outcome import JobError

__all__ = ["BLANK", "ERROR", "ODD_VALUES", "VALUES"]

BLANK: Final[dict[str, Any]] = {
    "status": 0,
    "in": None,
    "out": None,
    "metadata": {},
    "intermediate": {"budget": [], "objective": []},
}
ERROR: Final = JobError(
    "exception",
    "it is too hot: 90 °C",
    type="ValueError",
    traceback="Traceback …\n",
    host="here",
    pid=2**22,
    attempts=2,
    history=(JobError("worker_died", "", exit_code=-9, signal=9),),
)
VALUES: Final[list[Any]] = [
    None,
    0,
    0.0,
    -0.0,
    False,
    True,
    1.0,
    "",
    "F_reason",
    "naïve ☂ \U0001f980 \x00 \n",
    b"",
    b"\x00\xff\x80",
    math.nan,
    math.inf,
    -math.inf,
    5e-324,
    1.7976931348623157e308,
    0.1 + 0.2,
    2**53 + 1,
    2**63,
    -(2**63) - 1,
    2**64,
    -(10**40),
    [],
    {},
    (),
    (1.0, "F_x"),
    [1, [2.0, [None, {"a": (True, [b"x"])}]]],
    {"": 0, "a": {"b": {"c": [math.nan, {"d": None}]}}, "é": [[]]},
    "x" * 100_000,
]
ODD_VALUES: Final[list[Any]] = [
    "\udc80 of a file name",
    {1: 2},
    {1.5: None, True: 1, None: 2},
    {(1, 2): 3},
    {b"a": 1, "a": 2},
    print,
    [{"deep": [print]}],
]
