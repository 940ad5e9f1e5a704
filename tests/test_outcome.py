"""The run-function standards: what counts as an objective, and that no output and no exception loses its job."""

from __future__ import annotations

import copy
import importlib.util
import math
import os
import pickle
import socket
from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paraval import HPOJob, Job, JobError, JobStatus, ParavalError
from paraval.outcome import Outcome, error_from_exception, is_failure, standardize


class Opaque:
    """An object of the run-function's own."""

    def __repr__(self) -> str:
        return "Opaque()"


# -- strategies --------------------------------------------------------------------------------------------------------

numbers = (
    st.integers()
    | st.integers(min_value=10**300, max_value=10**400)
    | st.floats()
    | st.booleans()
    | st.decimals()
    | st.fractions()
)
scalars = numbers | st.text()
several = st.lists(scalars, min_size=1, max_size=4) | st.lists(scalars, min_size=1, max_size=4).map(tuple)
objectives = scalars | several
keys = st.text(max_size=8)
metadata = st.dictionaries(keys, st.integers() | st.text() | st.none() | st.lists(st.integers()), max_size=4)
never_objectives = (
    st.none()
    | st.binary()
    | st.complex_numbers()
    | st.binary().map(bytearray)
    | st.sets(st.integers(), max_size=1)
    | st.frozensets(st.integers(), max_size=1)
    | st.builds(Opaque)
    | st.just(...)
    | st.just(len)
    | st.dates()
)
anything = st.recursive(
    scalars | never_objectives,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.sampled_from(["objective", "output", "metadata", "x"]), inner, max_size=3)
        | st.dictionaries(st.integers() | st.none(), inner, max_size=2)
    ),
    max_leaves=8,
)


def expected_scalar(value: Any) -> float | str:
    """Say what the standards make of a scalar."""
    if isinstance(value, str):
        return value
    if isinstance(value, Decimal) and not value.is_finite():
        return "F"
    try:
        number = float(value)
    except OverflowError:
        return "F"
    return number if math.isfinite(number) else "F"


def expected_objective(value: Any) -> Any:
    """Say what the standards make of an objective."""
    if isinstance(value, list):
        return [expected_scalar(item) for item in value]
    if isinstance(value, tuple):
        return tuple(expected_scalar(item) for item in value)
    return expected_scalar(value)


def hpo(output: Any) -> HPOJob:
    job = HPOJob("0.0", {"x": 1})
    job.settle(Outcome(output))
    return job


def assert_standard(objective: Any) -> None:
    """Make sure of the exact types: whoever writes, plots or compares objectives need not look for any other."""
    items = objective if isinstance(objective, tuple | list) else [objective]
    for item in items:
        assert type(item) in (float, str)
        assert isinstance(item, str) or math.isfinite(item)


# -- what is allowed ---------------------------------------------------------------------------------------------------


@given(objectives)
def test_objectives_become_floats_and_strings(output: Any) -> None:
    job = hpo(output)
    assert job.error is None
    assert job.status is JobStatus.DONE
    assert job.objective == expected_objective(output)
    assert type(job.objective) is type(expected_objective(output))
    assert_standard(job.objective)
    assert job.output == {"objective": job.objective}
    assert job.metadata == {}


@given(objectives, metadata, st.dictionaries(keys, st.integers(), max_size=3))
def test_a_dict_keeps_extra_keys_and_gives_up_its_metadata(
    output: Any, noted: dict[str, Any], extra: dict[str, int]
) -> None:
    extra = {key: value for key, value in extra.items() if key not in {"objective", "metadata"}}
    job = hpo({"objective": output, "metadata": noted, **extra})
    assert job.error is None
    assert job.objective == expected_objective(output)
    assert job.metadata == noted
    assert job.output == {"objective": job.objective, **extra}


@given(objectives, metadata, metadata, st.booleans())
def test_a_profiled_output_is_unwrapped(
    output: Any, outer: dict[str, Any], inner: dict[str, Any], as_dict: bool
) -> None:
    wrapped = {"objective": output, "metadata": inner} if as_dict else output
    job = hpo({"output": wrapped, "metadata": outer})
    assert job.error is None
    assert job.objective == expected_objective(output)
    assert job.metadata == (outer | inner if as_dict else outer)
    assert "metadata" not in job.output
    assert "output" not in job.output


@given(anything)
def test_no_output_loses_its_job(output: Any) -> None:
    job = hpo(output)
    assert job.status is JobStatus.DONE
    assert_standard(job.objective)
    if job.error is None:
        assert set(job.output) >= {"objective"}
    else:
        assert job.error.type in ("TypeError", "ValueError")
        assert job.objective == f"F_{job.error.type}"
        assert job.error.kind == "exception"
        assert job.error.message
        assert "\n" not in job.error.message
        assert job.failed


@given(anything)
def test_the_output_itself_is_left_as_it_was(output: Any) -> None:
    before = copy.deepcopy(output)
    hpo(output)
    assert repr(output) == repr(before)


@given(objectives)
def test_the_standard_form_is_its_own_standard_form(output: Any) -> None:
    standard, _ = standardize(output)
    again, noted = standardize(standard)
    assert again == standard
    assert noted == {}


@pytest.mark.parametrize(
    "value", [math.nan, math.inf, -math.inf, Decimal("nan"), Decimal("-inf"), Decimal("snan"), 10**400]
)
def test_what_is_no_finite_number_is_a_failure(value: Any) -> None:
    assert hpo(value).objective == "F"
    assert hpo(value).failed
    assert hpo(value).error is None
    assert hpo((1.0, value)).objective == (1.0, "F")
    assert hpo([value, 1]).objective == ["F", 1.0]
    assert hpo({"objective": value}).objective == "F"


@pytest.mark.parametrize("value", [0, 0.0, False, -0.0, Fraction(0), Decimal(0)])
def test_zero_and_false_are_results(value: Any) -> None:
    job = hpo(value)
    assert job.objective == 0.0
    assert type(job.objective) is float
    assert not job.failed


@pytest.mark.parametrize("value", ["", "F", "F_oom", "Failed", "good", "1.5"])
def test_strings_are_kept_and_are_failures(value: str) -> None:
    assert hpo(value).objective == value
    assert hpo(value).error is None
    for output in (value, {"objective": value}, (value, 1.0), [1.0, value]):
        assert hpo(output).failed


def test_subclasses_of_str_and_float_become_plain() -> None:
    class Text(str):
        __slots__ = ()

    class Number(float):
        __slots__ = ()

    assert type(hpo(Text("F_x")).objective) is str
    assert type(hpo(Number(2)).objective) is float


# -- what is not -------------------------------------------------------------------------------------------------------


@given(never_objectives)
def test_what_is_no_objective_is_a_type_error_of_this_job(output: Any) -> None:
    for value in (output, {"objective": output}, (1.0, output), {"output": output, "metadata": {}}):
        with pytest.raises(TypeError, match=type(output).__name__) as caught:
            standardize(value)
        assert isinstance(caught.value, ParavalError)
        job = hpo(value)
        assert job.objective == "F_TypeError"
        assert job.status is JobStatus.DONE
        assert job.error is not None
        assert job.error.type == "TypeError"


@pytest.mark.parametrize(
    "output", [{}, {"loss": 1.0}, {"metadata": {}}, {3: 4}, (), [], {"objective": []}, {"output": {}}]
)
def test_a_missing_objective_is_a_value_error_of_this_job(output: Any) -> None:
    with pytest.raises(ValueError, match=r"objective") as caught:
        standardize(output)
    assert isinstance(caught.value, ParavalError)
    assert hpo(output).objective == "F_ValueError"


@pytest.mark.parametrize("noted", [[1], "text", 3, (1, 2), {1, 2}])
def test_metadata_that_is_no_dict_is_a_type_error(noted: Any) -> None:
    with pytest.raises(TypeError, match="metadata"):
        standardize({"objective": 1.0, "metadata": noted})
    assert hpo({"objective": 1.0, "metadata": noted}).objective == "F_TypeError"


def test_metadata_may_be_none() -> None:
    assert standardize({"objective": 1.0, "metadata": None}) == ({"objective": 1.0}, {})


def test_a_number_that_cannot_become_a_float_is_the_failure_of_its_job() -> None:
    class Broken(Fraction):
        def __float__(self) -> float:
            raise ZeroDivisionError("a defect of the run-function's own type")

    job = hpo(Broken(1, 2))
    assert job.status is JobStatus.DONE
    assert job.objective == "F_ZeroDivisionError"


def test_nested_tuples_are_no_objectives() -> None:
    assert hpo(((1.0, 2.0), 3.0)).objective == "F_TypeError"


# -- NumPy -------------------------------------------------------------------------------------------------------------

needs_numpy = pytest.mark.skipif(
    importlib.util.find_spec("numpy") is None, reason="numpy is not installed (dependency group 'test')"
)


@needs_numpy
@pytest.mark.parametrize(
    "name", ["float16", "float32", "float64", "longdouble", "int8", "int64", "uint8", "uint64", "bool_"]
)
def test_numpy_scalars_are_numbers(name: str) -> None:
    import numpy as np

    scalar = getattr(np, name)(1)
    for output in (scalar, {"objective": scalar}, {"output": scalar, "metadata": {}}):
        job = hpo(output)
        assert job.objective == 1.0
        assert type(job.objective) is float
    assert hpo((scalar, 2)).objective == (1.0, 2.0)


@needs_numpy
def test_numpy_scalars_that_are_not_finite_are_failures() -> None:
    import numpy as np

    for scalar in (np.float64("nan"), np.float32("inf"), np.float16("-inf"), np.longdouble("nan")):
        assert hpo(scalar).objective == "F"
        assert hpo([scalar, scalar]).objective == ["F", "F"]


@needs_numpy
def test_numpy_zero_and_false_are_results() -> None:
    import numpy as np

    assert hpo(np.float64(0)).objective == 0.0
    assert hpo(np.bool_(False)).objective == 0.0
    assert not hpo(np.bool_(False)).failed


@needs_numpy
def test_numpy_arrays_and_other_kinds_are_no_objectives() -> None:
    import numpy as np

    others = (np.complex128(1j), np.datetime64("2020-01-01"), np.bytes_(b"x"))
    for output in (np.array([1.0, 2.0]), np.array(1.0), *others):
        assert hpo(output).objective == "F_TypeError"


@needs_numpy
def test_numpy_strings_become_plain() -> None:
    import numpy as np

    job = hpo(np.str_("F_oom"))
    assert job.objective == "F_oom"
    assert type(job.objective) is str


# -- a plain Job -------------------------------------------------------------------------------------------------------


@given(anything)
def test_a_plain_job_keeps_any_output(output: Any) -> None:
    job = Job("0.0", {})
    job.settle(Outcome(output))
    assert job.status is JobStatus.DONE
    assert job.error is None
    if isinstance(output, dict) and output.keys() == {"output", "metadata"} and isinstance(output["metadata"], dict):
        assert job.output is output["output"]
        assert job.metadata == output["metadata"]
    else:
        assert job.output is output
        assert job.metadata == {}


# -- failures as objectives --------------------------------------------------------------------------------------------


@given(objectives)
def test_any_failed_objective_makes_a_failure(output: Any) -> None:
    objective = expected_objective(output)
    several = objective if isinstance(objective, tuple | list) else [objective]
    assert is_failure(objective) == any(isinstance(item, str) for item in several)


def test_none_is_no_failure() -> None:
    assert not is_failure(None)


# -- exceptions as data ------------------------------------------------------------------------------------------------


class NeedsArguments(Exception):  # noqa: N818 - the shape matters, not the name
    def __init__(self, left: int, right: int) -> None:
        super().__init__(f"{left} and {right}")
        self.left = left


class BrokenStr(Exception):  # noqa: N818 - likewise
    def __init__(self, inner: BaseException) -> None:
        self.inner = inner

    def __str__(self) -> str:
        raise self.inner

    __repr__ = __str__


class NotText(Exception):  # noqa: N818 - likewise
    def __str__(self) -> str:
        return 3  # type: ignore[return-value] # noqa: PLE0307 - it is the defect that is tested


@given(st.text())
def test_an_exception_becomes_data(message: str) -> None:
    try:
        raise LookupError(message)
    except LookupError as exc:
        error = error_from_exception(exc)
    assert error.kind == "exception"
    assert error.type == "LookupError"
    assert error.message == message
    assert error.traceback is not None
    assert "test_an_exception_becomes_data" in error.traceback
    assert error.reason == "F_LookupError"
    assert (error.host, error.pid) == (socket.gethostname(), os.getpid())
    assert (error.exit_code, error.signal, error.attempts) == (None, None, 1)
    assert pickle.loads(pickle.dumps(error)) == error  # noqa: S301 - made in the line itself


@pytest.mark.parametrize(
    "exc",
    [
        NeedsArguments(1, 2),
        BrokenStr(ValueError("broken")),
        BrokenStr(SystemExit(3)),
        BrokenStr(KeyboardInterrupt()),
        BrokenStr(GeneratorExit()),
        NotText(),
        SystemExit(3),
        KeyboardInterrupt(),
        GeneratorExit(),
        BaseExceptionGroup("both", [ValueError(1), KeyboardInterrupt()]),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"),
        OSError(2, "No such file", "x"),
    ],
    ids=lambda exc: type(exc).__name__,
)
def test_every_exception_becomes_data_whatever_its_own_methods_do(exc: BaseException) -> None:
    try:
        error = error_from_exception(exc)
    except BaseException as escaped:  # noqa: BLE001 - pytest itself would be stopped by most of these
        escape = type(escaped).__name__
        pytest.fail(f"{escape} escaped", pytrace=False)
    assert error.type == type(exc).__name__
    assert error.reason == f"F_{type(exc).__name__}"
    assert isinstance(error.message, str)
    job = HPOJob("0.0", {})
    job.settle(Outcome(error=error))
    assert job.objective == error.reason
    assert job.status is JobStatus.DONE


def test_the_causes_of_an_exception_are_in_its_traceback() -> None:
    try:
        try:
            raise KeyError("inner")
        except KeyError as exc:
            raise ValueError("outer") from exc
    except ValueError as exc:
        exc.add_note("a note")
        error = error_from_exception(exc)
    assert error.traceback is not None
    for part in ("KeyError: 'inner'", "direct cause", "ValueError: outer", "a note"):
        assert part in error.traceback


@pytest.mark.parametrize(
    ("error", "reason", "summary"),
    [
        (JobError("exception", "bad", type="ValueError"), "F_ValueError", "ValueError: bad"),
        (JobError("exception", "", type="ValueError"), "F_ValueError", "ValueError"),
        (JobError("exception", "bad:\n  x\n", type="ValueError"), "F_ValueError", "ValueError: bad: x"),
        (JobError("timeout", "too long"), "F_timeout", "timeout: too long"),
        (JobError("cancelled", "stop"), "F_cancelled", "cancelled: stop"),
        (JobError("worker_died", "gone", type="OSError"), "F_worker_died", "OSError: gone"),
        (JobError("memory_limit_exceeded", "much"), "F_memory_limit_exceeded", "memory_limit_exceeded: much"),
    ],
)
def test_the_reason_names_what_happened(error: JobError, reason: str, summary: str) -> None:
    assert error.reason == reason
    assert error.summary == summary
    assert is_failure(error.reason)
