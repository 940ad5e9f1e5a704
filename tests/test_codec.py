"""How values and records are written at rest."""

from __future__ import annotations

import copy
import dataclasses
import datetime as dt
import decimal
import enum
import math
import pathlib
import pickle
import re
import subprocess
import sys
import uuid
from collections import Counter, OrderedDict, namedtuple
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any
from zoneinfo import ZoneInfo

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paraval import JobError, ParavalError
from paraval.errors import CorruptStoreError
from paraval.storage import JobChange, JobRecord, UnstorableError
from paraval.storage.codec import (
    decode,
    decode_change,
    decode_error,
    decode_record,
    encode,
    encode_change,
    encode_changes,
    encode_ends,
    encode_error,
    encode_record,
    encode_records,
    key_of,
)
from paraval.testing.comparing import same


def kind(value: object) -> str:
    """Name a parameter, in the same way in each process that collects the tests."""
    return type(value).__name__


class Colour(enum.Enum):
    RED = "red"
    PAIR = (1, "two")


class Level(enum.IntEnum):
    HIGH = 3


class Word(str):
    __slots__ = ()

    def __str__(self) -> str:
        return "not this"


class Whole(int):
    def __int__(self) -> int:
        return -1


Point = namedtuple("Point", ["x", "y"])  # noqa: PYI024 - of the kind that older code has


@dataclasses.dataclass(frozen=True)
class Layer:
    width: int
    kind: Any = None


class Net(msgspec.Struct, frozen=True):
    layers: list[Layer]


class OwnMapping(Mapping[str, int]):
    def __getitem__(self, key: str) -> int:
        return 1

    def __iter__(self) -> Iterator[str]:
        return iter("ab")

    def __len__(self) -> int:
        return 2


# -- what comes back as it is ------------------------------------------------------------------------------------------

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(2**200), 2**200)
    | st.floats()
    | st.text()
    | st.text(st.characters(categories=["Cs", "Lu"]), max_size=3)
    | st.binary()
    | st.datetimes()
    | st.datetimes(timezones=st.just(dt.timezone(dt.timedelta(hours=5, minutes=30))))
)
keys = st.recursive(
    scalars.filter(lambda value: not (isinstance(value, float) and math.isnan(value))),
    lambda inner: st.lists(inner, max_size=2).map(tuple),
    max_leaves=3,
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(st.text(max_size=3), inner, max_size=4)
        | st.dictionaries(keys, inner, max_size=4)
    ),
)


@given(values)
def test_what_is_kept_comes_back(value: Any) -> None:
    before = copy.deepcopy(value)
    back = decode(encode(value, "output"))
    assert same(back, value)
    assert same(value, before), "and is not changed by it"
    assert same(decode(encode(back, "output")), back)


@pytest.mark.parametrize(
    "value",
    [
        0,
        0.0,
        -0.0,
        False,
        True,
        1,
        1.0,
        math.nan,
        math.inf,
        -math.inf,
        2**63 - 1,
        2**63,
        2**64 - 1,
        2**64,
        -(2**63),
        -(2**63) - 1,
        10**400,
        "",
        "\ud800",
        "a\x00b",
        b"\x80",
        {1: 2, "1": 3, b"1": 4, None: 5, 1.5: 6},
        {True: 1, 0: 2},
        {2**70: 1, (1, (2, "\udc80")): 2, dt.datetime(2020, 1, 1): 3},  # noqa: DTZ001 - a naive one
        dt.datetime(1, 1, 1),  # noqa: DTZ001 - likewise
        dt.datetime(9999, 12, 31, 23, 59, 59, 999999, tzinfo=dt.UTC),
    ],
    ids=kind,
)
def test_values_at_the_edges_come_back(value: Any) -> None:
    assert same(decode(encode(value, "output")), value)
    assert same(decode(encode([{"x": value}], "output")), [{"x": value}])


def test_the_order_of_keys_is_kept() -> None:
    for value in ({"b": 1, "a": 2}, {"b": 1, 2: 2, "a": 3}, {(2,): 1, (1,): 2}):
        assert list(decode(encode(value, "output"))) == list(value)


def test_a_datetime_keeps_its_time_zone_as_an_offset() -> None:
    moment = dt.datetime(2024, 7, 1, 12, tzinfo=ZoneInfo("Europe/Berlin"))
    back = decode(encode({"at": moment}, "output"))["at"]
    assert back == moment
    assert back.utcoffset() == dt.timedelta(hours=2)


# -- what comes back in another form -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "form"),
    [
        ((1, (2, 3)), [1, [2, 3]]),
        ({3, 1, 2}, [1, 2, 3]),
        (frozenset({"b", "a"}), ["a", "b"]),
        ({(1, 2): {5}}, {(1, 2): [5]}),
        (bytearray(b"x"), b"x"),
        (memoryview(b"x"), b"x"),
        (Colour.RED, "red"),
        (Colour.PAIR, [1, "two"]),
        ({Colour.RED: Level.HIGH}, {"red": 3}),
        (Level.HIGH, 3),
        (pathlib.Path("/a/b"), "/a/b"),
        (pathlib.PurePosixPath("a"), "a"),
        (decimal.Decimal("1.50"), "1.50"),
        (uuid.UUID(int=5), "00000000-0000-0000-0000-000000000005"),
        (dt.date(2024, 5, 6), "2024-05-06"),
        (dt.time(1, 2), "01:02:00"),
        (dt.timedelta(hours=1, microseconds=1), 3600.000001),
        (Layer(3), {"width": 3, "kind": None}),
        (Net([Layer(3, Layer(4))]), {"layers": [{"width": 3, "kind": {"width": 4, "kind": None}}]}),
        (Point(1, 2), [1, 2]),
        (Word("word"), "word"),
        ({Word("word"): 1}, {"word": 1}),
        (OrderedDict(b=1, a=2), {"b": 1, "a": 2}),
        (Counter("aab"), {"a": 2, "b": 1}),
        (MappingProxyType({"a": 1}), {"a": 1}),
        (OwnMapping(), {"a": 1, "b": 1}),
    ],
    ids=kind,
)
def test_a_value_takes_the_form_that_can_be_kept(value: Any, form: Any) -> None:
    for wrap in (lambda each: each, lambda each: {"x": [each]}):
        back = decode(encode(wrap(value), "output"))
        assert same(back, wrap(form))
        assert same(decode(encode(back, "output")), back)


@pytest.mark.parametrize(
    ("expression", "form"),
    [
        ("np.float64(0.5)", 0.5),
        ("np.float32(0.5)", 0.5),
        ("np.int64(3)", 3),
        ("np.uint64(2**64 - 1)", 2**64 - 1),
        ("np.bool_(True)", True),
        ("np.str_('a')", "a"),
        ("np.bytes_(b'a')", b"a"),
        ("np.longdouble(1.5)", 1.5),
        ("np.array(2.5)", 2.5),
        ("np.arange(6).reshape(2, 3)", [[0, 1, 2], [3, 4, 5]]),
        ("np.array([0.0, -0.0, np.nan, np.inf])", [0.0, -0.0, math.nan, math.inf]),
        ("np.array([])", []),
        ("np.array(['a', 'bc'])", ["a", "bc"]),
        ("np.array([2**70, None, {'a': np.int8(1)}], dtype=object)", [2**70, None, {"a": 1}]),
        ("np.array([(1, 2.5)], dtype=[('a', 'i4'), ('b', 'f8')])", [[1, 2.5]]),
        ("np.datetime64('2024-05-06T07:08:09')", dt.datetime(2024, 5, 6, 7, 8, 9)),  # noqa: DTZ001 - a naive one
        ("{np.int64(1): np.float64(2)}", {1: 2.0}),
    ],
)
def test_numpy_becomes_numbers(expression: str, form: Any) -> None:
    np = pytest.importorskip("numpy")
    value = eval(expression, {"np": np})  # noqa: S307 - one of the expressions above
    assert same(decode(encode({"x": value}, "output")), {"x": form})
    assert key_of("f", {"x": value}) == key_of("f", {"x": form})


def test_it_does_not_import_what_it_knows_by_its_ways() -> None:
    program = (
        "import sys; from paraval.storage.codec import encode; encode({'x': [1.5, (2,)]}, 'output');"
        "print(sorted({'numpy', 'pickle', 'cloudpickle'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=50)
    assert done.stdout.strip() == "[]"


# -- what is refused ---------------------------------------------------------------------------------------------------


class Model:
    pass


class Broken:
    dtype = "float"

    def tolist(self) -> None:
        raise RuntimeError("it\nis\nempty")


def contains_itself() -> Any:
    value: list[Any] = []
    value.append({"again": value})
    return value


def nested(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


class Unhashable(type):
    __hash__ = None  # type: ignore[assignment] # that is what is tested


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (Model(), r"value is a test_codec\.Model; a store keeps None, bool"),
        ({"model": Model()}, r"value\['model'\] is a test_codec\.Model"),
        ({"a": [1, {"b": (Model(),)}]}, r"value\['a'\]\[1\]\['b'\]\[0\] is a test_codec\.Model"),
        ([Layer(3, Model())], r"value\[0\]\.kind is a test_codec\.Model"),
        (Net([Layer(3, print)]), r"value\.layers\[0\]\.kind is a builtin_function_or_method"),
        ({Model: 1}, r"value\[<class 'test_codec\.Model'>\] \(its key\) is a type"),
        ({(1, Model): 1}, r"\(its key\)\[1\] is a type"),
        (lambda: 1, "value is a function"),
        (1j, "value is a complex"),
        (Ellipsis, "value is a ellipsis"),
        ([msgspec.UNSET], r"value\[0\] is a msgspec"),
        (range(3), "value is a range"),
        (JobError, "value is a type"),
        (Broken(), "reading it raised RuntimeError: it is empty"),
        (contains_itself(), "contains itself, or is nested deeper than 100 levels"),
        (nested(102), "nested deeper than 100 levels"),
        (nested(5000), "nested deeper than 100 levels"),
        ({pathlib.Path("a"): 1, "a": 2}, r"keys of value that differ here would be the same"),
        ({"x": {Layer(1): 1}}, "keys of .* that differ here would be the same in the store, or could be none there"),
        ({(Layer(1), "relu"): 1}, "keys of .* could be none there"),
        ({dt.timedelta(seconds=1): "a", 1: "b"}, "keys of .* would be the same in the store"),
        (Unhashable("T", (), {})(), "reading it raised TypeError: unhashable type: 'Unhashable'"),
        ([{"x": Unhashable("T", (), {})()}], "reading it raised TypeError: unhashable type: 'Unhashable'"),
    ],
    ids=kind,
)
def test_what_cannot_be_kept_is_named(value: Any, said: str) -> None:
    calls: list[tuple[str, Callable[[], object]]] = [
        ("output", lambda: encode(value, "output")),
        ("output", lambda: encode_record(JobRecord(out=value))),
        ("extra value", lambda: encode_change(JobChange("", extra={"x": value}))),
        ("metadata", lambda: encode_records([JobRecord(args=({},), metadata={"x": value})])),
        ("metadata", lambda: encode_ends([JobChange("", status=2, out=1.0, error=None, metadata={"x": value})], [0])),
    ]
    for what, call in calls:
        expected = said if what == "output" else re.sub(r"\bvalue(?! of)", r".*", said)
        with pytest.raises(UnstorableError, match=expected) as caught:
            call()
        message = str(caught.value)
        assert message.startswith(f"the {what} cannot be stored: ")
        assert "\n" not in message
        assert isinstance(caught.value, TypeError)
        assert isinstance(caught.value, ParavalError)


@pytest.mark.parametrize(
    "change",
    [
        JobChange("", args={"x": 1}),  # type: ignore[arg-type] # what is wrong with it
        JobChange("", args="ab"),  # type: ignore[arg-type] # likewise; and so on
        *[JobChange("", status=status) for status in (True, None, 2.0, "x", 2**70)],  # type: ignore[arg-type] # on
        JobChange("", kwargs=[1]),  # type: ignore[arg-type] # on
        JobChange("", metadata=[1]),  # type: ignore[arg-type] # on
        JobChange("", status=2, out=1.0, error=None, metadata=[1]),  # type: ignore[arg-type] # on
        JobChange("", extra=5),  # type: ignore[arg-type] # on
        JobChange("", intermediate=(1.0, 2, 3)),  # type: ignore[arg-type] # on
        JobChange("", error="text"),  # type: ignore[arg-type] # on
    ],
    ids=str,
)
def test_a_change_that_could_not_be_read_is_refused(change: JobChange) -> None:
    calls: list[Callable[[], object]] = [
        lambda: encode_change(change),
        lambda: encode_changes([JobChange("", out=1), change], [0, 1]),
    ]
    for call in calls:
        with pytest.raises(UnstorableError, match="of a job cannot be stored: it should be "):
            call()
    assert encode_ends([change], [0]) is None


@pytest.mark.parametrize(
    "record",
    [
        JobRecord(args={"x": 1}),  # type: ignore[arg-type] # what is wrong with it
        JobRecord(args=({},), status=True),
        JobRecord(args=({},), metadata={}, attempts=True),
        JobRecord(args=({},), metadata={}, is_private=1),  # type: ignore[arg-type] # likewise; and so on
        JobRecord(args=({},), metadata={}, function=5),  # type: ignore[arg-type] # on
        JobRecord(args=({},), metadata={}, owner=["me"]),  # type: ignore[arg-type] # on
        JobRecord(args=({},), metadata={}, budgets=5),  # type: ignore[arg-type] # on
        JobRecord(error="x"),  # type: ignore[arg-type] # on
    ],
    ids=str,
)
def test_a_record_that_could_not_be_read_is_refused(record: JobRecord) -> None:
    calls: list[Callable[[], object]] = [lambda: encode_record(record), lambda: encode_records([record])]
    for call in calls:
        with pytest.raises(UnstorableError, match="of a job cannot be stored: it should be "):
            call()


def test_a_hundred_levels_are_not_too_many() -> None:
    assert decode(encode(nested(100), "output")) == nested(100)


# -- damage ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        b"\x92\x01",
        b"\x01\x02",
        b"\xdd\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\x91" * 100_000,
        b"\xd4\x09\x00",
        b"\xd4\x03x",
        b"\xd4\x02\xff",
        b"\xd4\x04\x01",
        msgspec.msgpack.encode({"args": 5}),
        msgspec.msgpack.encode({"kwargs": 5}),
        msgspec.msgpack.encode({"metadata": [1]}),
        msgspec.msgpack.encode({"error": 5}),
        msgspec.msgpack.encode({"status": "x"}),
        b"\xc7\x04\x04\x91\x92\x80\x01",
        b"\x81\x80\x01",
        pickle.dumps(print),
    ],
    ids=lambda data: repr(data)[:30],
)
def test_damaged_bytes_are_an_error_of_ours(data: bytes) -> None:
    for call in (decode_change, decode_record, lambda data: decode_record(b"\x01" + data)):
        with pytest.raises(CorruptStoreError):
            call(data)
    if not data.startswith((b"\x81\xa4", b"\x81\xa5", b"\x81\xa6", b"\x81\xa8")):
        with pytest.raises(CorruptStoreError):
            decode(data)


@given(st.binary(max_size=40))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    for call in (decode, decode_change, decode_record, lambda data: decode_record(b"\x01" + data)):
        try:
            call(data)
        except CorruptStoreError as exc:
            assert "\n" not in str(exc)  # noqa: PT017 - most bytes are refused, not all


# -- records and changes -----------------------------------------------------------------------------------------------

ERROR = JobError(
    "exception",
    "é\n",
    type="ValueError",
    traceback="…",
    host="here",
    pid=7,
    attempts=2,
    history=(JobError("worker_died", "", exit_code=-9, signal=9), JobError("timeout", "late")),
)
dicts = st.none() | st.dictionaries(st.text(max_size=2), values, max_size=2)
records = st.builds(
    JobRecord,
    id=st.sampled_from(["", "0.1"]),
    status=st.integers(0, 4),
    args=st.none() | st.lists(values, max_size=2).map(tuple),
    kwargs=dicts,
    out=values,
    error=st.sampled_from([None, ERROR, ERROR._replace(message="\udc80")]),
    metadata=dicts,
    budgets=st.none() | st.lists(st.floats(), max_size=3),
    objectives=st.none() | st.lists(values, max_size=3),
    function=st.none() | st.text(max_size=3),
    owner=st.none() | st.text(max_size=3),
    attempts=st.integers(0, 3),
    is_private=st.booleans(),
    extra=dicts,
    revision=st.integers(0, 2**40),
)


@given(records)
def test_a_record_comes_back(record: JobRecord) -> None:
    before = copy.deepcopy(msgspec.structs.asdict(record))
    back = decode_record(encode_record(record))
    assert same(msgspec.structs.asdict(back), before)
    assert same(msgspec.structs.asdict(record), before)
    assert back.args is None or type(back.args) is tuple
    assert back.error is None or (type(back.error) is JobError and all(type(e) is JobError for e in back.error.history))


@given(records, st.sampled_from([{}, {"status": 3}]))
def test_a_change_comes_back(record: JobRecord, more: dict[str, Any]) -> None:
    change = JobChange(
        "0.1", args=record.args, out=record.out, error=record.error, metadata=record.metadata, by="me", **more
    )
    changed, expected = JobRecord(kwargs={"a": 1}), JobRecord(kwargs={"a": 1})
    copy.deepcopy(change).apply_to(expected)
    decode_change(encode_change(change)).apply_to(changed)
    assert same(msgspec.structs.asdict(changed), msgspec.structs.asdict(expected))


def test_none_is_set_and_unset_is_not() -> None:
    change = decode_change(encode_change(JobChange("0.1", out=None, error=None, intermediate=(1.0, None))))
    assert change == JobChange("", out=None, error=None, intermediate=(1.0, None))
    assert decode_change(encode_change(JobChange("0.1"))) == JobChange("")


def test_fields_of_a_later_release_are_ignored() -> None:
    stored = msgspec.msgpack.decode(encode_record(JobRecord("0.1", out=5, error=ERROR))[1:])
    stored["colour"] = "red"
    stored["error"]["colour"] = "red"
    stored["error"]["history"][0]["colour"] = "red"
    assert decode_record(b"\x01" + msgspec.msgpack.encode(stored)) == JobRecord("0.1", out=5, error=ERROR)
    changed = msgspec.msgpack.encode({"out": 1, "colour": "red"})
    assert decode_change(changed) == JobChange("", out=1)


def test_another_form_of_a_later_release_is_refused() -> None:
    data = encode_record(JobRecord())
    with pytest.raises(CorruptStoreError, match="a later release wrote it"):
        decode_record(b"\x02" + data[1:])


def test_the_form_at_rest_is_this() -> None:
    """Stores of the first release may be anywhere: what is here must not change."""
    record = JobRecord("0.1", 2, ({"x": 1},), None, 0.5, JobError("timeout", "late"), {"a": 2**64}, is_private=True)
    data = encode_record(record)
    assert data[:1] == b"\x01"
    assert msgspec.msgpack.decode(data[1:], ext_hook=lambda code, data: (code, bytes(data))) == {
        "id": "0.1",
        "status": 2,
        "args": [{"x": 1}],
        "out": 0.5,
        "error": {"kind": "timeout", "message": "late"},
        "metadata": {"a": (1, b"\x01" + bytes(8))},
        "is_private": True,
    }
    assert encode("\ud800", "") == b"\xc7\x03\x02\xed\xa0\x80"
    assert encode(dt.date(2024, 1, 2), "") == b"\xaa2024-01-02"
    assert encode(dt.datetime(2024, 1, 2, 3), "") == b"\xc7\x13\x032024-01-02T03:00:00"  # noqa: DTZ001 - a naive one
    assert decode(b"\xc7\x05\x04\x91\x92\x91\x01\x02") == {(1,): 2}


@pytest.mark.parametrize("stored", [None, 5, [], "x", {}, {"kind": "timeout"}, {"kind": 1, "message": 2, "history": 5}])
def test_what_is_no_error_is_damage(stored: Any) -> None:
    with pytest.raises(CorruptStoreError):
        decode_error(stored)


def test_an_error_comes_back() -> None:
    assert decode_error(encode_error(ERROR)) == ERROR
    assert encode_error(JobError("timeout", "late")) == {"kind": "timeout", "message": "late"}


# -- keys --------------------------------------------------------------------------------------------------------------

configurations = st.dictionaries(st.text(max_size=3), values, max_size=3)


@given(configurations)
def test_a_configuration_has_the_same_key_after_it_was_stored(args: dict[str, Any]) -> None:
    key = key_of("f", args)
    assert key == key_of("f", decode(encode(args, "argument")))
    assert key == key_of("f", dict(reversed(args.items())))
    assert key == key_of("f", copy.deepcopy(args))
    assert key != key_of("g", args)
    assert key != key_of(None, args)
    assert key != key_of("f", {**args, "one more": 1})


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
        ({"x": {"a": 1, "b": [{"c": 1, "d": 2}]}}, {"x": {"b": [{"d": 2, "c": 1}], "a": 1}}),
        ({"x": (1, 2)}, {"x": [1, 2]}),
        ({"x": {1: 1, "a": 2}}, {"x": {"a": 2, 1: 1}}),
        ({"x": {(1, 2): {"b": 1, "a": 2}, 3: 4}}, {"x": {3: 4, (1, 2): {"a": 2, "b": 1}}}),
        ({"x": {"c", "a", "b"}}, {"x": ["a", "b", "c"]}),
        ({"x": Colour.RED}, {"x": "red"}),
        ({"x": Layer(3)}, {"x": {"kind": None, "width": 3}}),
        ({"x": pathlib.Path("a")}, {"x": "a"}),
        (OrderedDict(b=1, a=2), {"a": 2, "b": 1}),
        ({"x": Word("a")}, {"x": "a"}),
    ],
)
def test_equal_configurations_have_equal_keys(one: Any, other: Any) -> None:
    assert key_of("f", one) == key_of("f", other)
    assert isinstance(key_of("f", one), bytes)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"x": 1}, {"x": 1.0}),
        ({"x": 1}, {"x": True}),
        ({"x": 0.0}, {"x": False}),
        ({"x": None}, {}),
        ({"x": "1"}, {"x": 1}),
        ({"x": b"a"}, {"x": "a"}),
        ({"x": [1, 2]}, {"x": [2, 1]}),
        ({"x": {1: 2}}, {"x": {"1": 2}}),
        ({"x": [[1], 2]}, {"x": [1, [2]]}),
        ({"x": 2**64}, {"x": 2**64 + 1}),
    ],
)
def test_different_configurations_have_different_keys(one: Any, other: Any) -> None:
    assert key_of("f", one) != key_of("f", other)


def test_nan_is_nan() -> None:
    assert key_of("f", {"x": math.nan}) == key_of("f", {"x": float("nan")})


def test_the_key_of_a_set_does_not_depend_on_the_process() -> None:
    program = (
        "from paraval.storage.codec import *; print(key_of('f', {'x': set('abcdefgh')}), encode(set('abcdefgh'), ''))"
    )
    said = {
        subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            check=True,
            timeout=50,
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(said) == 1


def test_what_cannot_be_stored_has_no_key() -> None:
    with pytest.raises(UnstorableError, match=r"the configuration cannot be stored: value\['x'\] is a test_codec"):
        key_of("f", {"x": Model()})
