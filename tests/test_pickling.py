"""How values cross between processes: as they are, or with the path to what is to blame."""

from __future__ import annotations

import enum
import functools
import math
import pickle
import textwrap
import threading
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import runfunctions
from paraval.worker.pickling import (
    PicklingFailed,
    PiecewisePickler,
    TooLargeError,
    dumps,
    explain,
    is_plain,
    loads_in_pieces,
)
from support import run_program

LOCK_TYPE = type(threading.Lock())

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.just("__main__")
    | st.binary()
)
keys = st.text() | st.integers() | st.tuples(st.integers(), st.text())
values = st.recursive(
    scalars | st.sets(st.integers()) | st.complex_numbers(allow_nan=False) | st.dates() | st.uuids(),
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(keys, inner),
    max_leaves=10,
)


def _copy(value: Any) -> Any:
    return pickle.loads(dumps(value, "value"))  # noqa: S301 - it was made here


# -- what crosses ------------------------------------------------------------------------------------------------------


@given(values)
def test_values_come_as_they_are(value: Any) -> None:
    copy = _copy(value)
    assert copy == value
    assert type(copy) is type(value)


dumps_in_pieces = PiecewisePickler().dumps
"""It lasts from one test to the next, as it does from job to job."""
LARGE = [
    bytes(range(256)) * 10_000,
    bytearray(3_000_001),
    "é" * 1_000_000,
    [{"a": number, "b": float(number)} for number in range(50_000)],
    [b"x" * 70_000, bytearray(b"y" * 70_000), "z" * 70_000, {"__main__": 1}],
]


@given(values)
def test_what_is_pickled_in_pieces_is_the_same(value: Any) -> None:
    data = dumps_in_pieces(value, "value")
    assert data == dumps(value, "value")
    copy = loads_in_pieces(data)
    assert copy == value
    assert type(copy) is type(value)


@pytest.mark.parametrize("value", LARGE, ids=lambda value: type(value).__name__)
def test_large_values_are_the_same_in_pieces(value: Any) -> None:
    data = dumps_in_pieces(value, "value")
    assert data == dumps(value, "value")
    assert loads_in_pieces(memoryview(data)) == value
    assert dumps_in_pieces(value, "value", len(data)) == data
    with pytest.raises(TooLargeError):
        dumps_in_pieces(value, "value", len(data) - 1)


@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_are_the_same_in_pieces(order: Any) -> None:
    np = pytest.importorskip("numpy", reason="NumPy is not installed")
    array = np.asarray(np.arange(600_000.0).reshape(3, -1), order=order)
    data = dumps_in_pieces([array, array[:, ::7]], "value")
    assert data == dumps([array, array[:, ::7]], "value")
    first, second = loads_in_pieces(data)
    assert (first == array).all()
    assert (second == array[:, ::7]).all()


def test_what_cannot_be_pickled_cannot_be_in_pieces() -> None:
    value = [bytes(100_000), {"lock": threading.Lock()}]
    with pytest.raises(PicklingFailed, match=r"^it\[1\]\['lock'\] cannot be pickled: lock object"):
        dumps_in_pieces(value, "it")
    assert loads_in_pieces(dumps_in_pieces(lambda: 5, "it"))() == 5
    with pytest.raises(TooLargeError):
        dumps_in_pieces(lambda: 5, "it", 10)


@given(values)
def test_bytes_are_what_is_made(value: Any) -> None:
    assert type(dumps(value, "value")) is bytes


@given(st.lists(values, min_size=1))
def test_what_is_shared_within_a_value_stays_shared(value: list[Any]) -> None:
    first, second = _copy((value, value))
    assert first is second


@given(values)
def test_what_is_plain_is_only_scalars(value: Any) -> None:
    def is_scalar(item: Any) -> bool:
        return type(item) in (int, float, str, bool, type(None))

    expected = is_scalar(value) or (
        type(value) is dict and all(is_scalar(key) and is_scalar(item) for key, item in value.items())
    )
    assert is_plain(value) is expected


class _Text(str):
    __slots__ = ()


class _Number(enum.IntEnum):
    ONE = 1


class _Dict(dict[str, int]):
    pass


@pytest.mark.parametrize(
    "value",
    [
        _Text("a"),
        _Number.ONE,
        {"x": _Text("a")},
        {_Text("a"): 1},
        {"x": _Number.ONE},
        _Dict(x=1),
        {"x": [1]},
        {"x": b""},
        dict.fromkeys(range(1001)),
    ],
    ids=repr,
)
def test_subclasses_and_containers_are_not_plain(value: Any) -> None:
    assert not is_plain(value)


@pytest.mark.parametrize("value", [{}, {"x": math.nan}, {1: None, False: "y"}, math.inf, "", 2**200], ids=repr)
def test_scalars_and_dicts_of_them_are_plain(value: Any) -> None:
    assert is_plain(value)


def test_functions_and_classes_of_anywhere_cross() -> None:
    offset = 3

    class Local:
        def __init__(self, x: int) -> None:
            self.x = x

        def moved(self) -> int:
            return self.x + offset

    copy = _copy({"class": Local, "object": Local(1), "function": lambda x: x + offset})
    assert copy["class"] is Local  # in the process that made it, it is known
    assert type(copy["object"]) is Local
    assert copy["object"].moved() == 4
    assert copy["function"](1) == 4


def test_what_is_defined_in_main_crosses_by_value() -> None:
    """In another process nothing of that name exists; so the bytes must hold the definitions."""
    program = run_program(
        """
        import subprocess, sys
        from paraval.worker.pickling import dumps

        OFFSET = 1

        class Point:
            def __init__(self, x):
                self.x = x

        def move(point):
            return Point(point.x + OFFSET)

        data = dumps((move, [Point(1)]), "value")
        reader = "import pickle, sys; f, (p,) = pickle.load(sys.stdin.buffer); print(f(p).x, type(f(p)) is type(p))"
        done = subprocess.run([sys.executable, "-c", reader], input=data, stdout=subprocess.PIPE)
        print(done.stdout.decode().strip())
        """
    )
    assert program.stdout == ["2 True"], program.stderr


def test_classes_of_main_keep_their_slots() -> None:
    program = run_program(
        """
        import dataclasses, pickle, subprocess, sys, typing
        from paraval.worker.pickling import dumps

        class Base:
            __slots__ = ("x", "__private")
            def __init__(self, x):
                self.x, self.__private = x, -x
            def both(self):
                return self.x, self.__private

        class Weak(Base):
            __slots__ = ("__weakref__",)

        class Loose(Base):
            def both(self):
                self.more = 1
                return super().both()

        @dataclasses.dataclass(slots=True)
        class Data:
            x: int
            def both(self):
                return self.x, self.x

        class Named(typing.NamedTuple):
            x: int
            def both(self):
                return self.x, self.x

        class Late:
            def __init__(self, x):
                self.x = x
            def both(self):
                return self.x, self.x

        Late.__slots__ = ("x",)  # a mere note

        CLASSES = [Base, Weak, Loose, Data, Named, Late]
        make = [lambda x, cls=cls: cls(x) for cls in CLASSES]
        worker = '''
        import pickle, sys
        from paraval.worker.pickling import dumps
        made = [function(3) for function in pickle.load(sys.stdin.buffer)]
        sys.stdout.buffer.write(dumps((made, [hasattr(one, "__dict__") for one in made]), "made"))
        '''
        import textwrap
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(worker)], input=dumps(make, "value"), stdout=subprocess.PIPE
        )
        made, have_dicts = pickle.loads(done.stdout)
        print(have_dicts, [one.both() for one in made], [type(one) for one in made] == CLASSES)
        """
    )
    told = "[False, False, True, False, False, True] [(3, -3), (3, -3), (3, -3), (3, 3), (3, 3), (3, 3)] True"
    assert program.stdout == [told], program.stderr


def test_functions_of_main_that_remember_their_results_go_by_value() -> None:
    program = run_program(
        """
        import functools
        from paraval import Evaluator

        @functools.lru_cache(maxsize=8)
        def load(count):
            return list(range(count))

        @functools.cache
        def fibonacci(n):
            return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)

        def run(job):
            return [load(job["x"]) is load(job["x"]), fibonacci(50), load.cache_parameters()["maxsize"]]

        with Evaluator.create(run, "process") as evaluator:
            print(evaluator.evaluate({"x": 3}).output)
        """
    )
    assert program.stdout == ["[True, 12586269025, 8]"], program.stderr


def test_of_a_function_that_remembers_its_results_its_own_notes_travel_and_nothing_is_guessed() -> None:
    program = run_program(
        """
        import functools
        from paraval import Evaluator

        @functools.cache
        def noted(x):
            return x
        noted.limit = 5

        def doubled(function):
            return functools.wraps(function)(functools.lru_cache(lambda x: 2 * function(x)))

        @doubled
        def value(x):
            return x

        with Evaluator.create(lambda job: noted(job["x"]) + noted.limit, "process") as evaluator:
            print(evaluator.evaluate({"x": 3}).output)
        with Evaluator.create(lambda job: value(job["x"]), "process") as evaluator:
            job = evaluator.evaluate({"x": 21})  # whose __wrapped__ is not what it calls
            print(job.output in (42, None), job.error is not None or job.output)
        """
    )
    assert program.stdout in (["8", "True 42"], ["8", "True True"]), program.stderr


def test_what_crosses_back_is_what_it_was() -> None:
    """A class of ``__main__`` that came to a child by value and comes back is the class it was."""
    program = run_program(
        """
        import subprocess, sys
        from paraval.worker.pickling import dumps
        import pickle

        class Point:
            pass

        child = '''
        import pickle, sys
        from paraval.worker.pickling import dumps
        point = pickle.load(sys.stdin.buffer)
        sys.stdout.buffer.write(dumps([point, type(point)()], "value"))
        '''.replace("        ", "")
        done = subprocess.run([sys.executable, "-c", child], input=dumps(Point(), "value"), stdout=subprocess.PIPE)
        print([type(point) is Point for point in pickle.loads(done.stdout)])
        """
    )
    assert program.stdout == ["[True, True]"], program.stderr


def test_plain_values_need_no_cloudpickle() -> None:
    program = run_program(
        """
        import sys
        from paraval.worker.pickling import dumps, is_plain
        is_plain({"x": 1}), dumps({"x": [1, (2, {3})]}, "value")
        print("cloudpickle" in sys.modules)
        """
    )
    assert program.stdout == ["False"], program.stderr


# -- who is to blame ---------------------------------------------------------------------------------------------------


class Box:
    """An object with an attribute."""

    def __init__(self, content: Any) -> None:
        self.content = content


def _in_list(inner: Any, others: list[Any]) -> tuple[Any, str]:
    return [*others, inner], f"[{len(others)}]"


def _in_tuple(inner: Any, others: list[Any]) -> tuple[Any, str]:
    return (inner, *others), "[0]"


def _in_dict(inner: Any, others: list[Any]) -> tuple[Any, str]:
    return {**{str(index): other for index, other in enumerate(others)}, "the key": inner}, "['the key']"


def _in_box(inner: Any, others: list[Any]) -> tuple[Any, str]:
    return Box(inner), ".content"


wrappings = st.lists(
    st.tuples(st.sampled_from([_in_list, _in_tuple, _in_dict, _in_box]), st.lists(values, max_size=3)), max_size=8
)


@given(wrappings)
def test_the_path_leads_to_what_cannot_be_pickled(
    layers: list[tuple[Callable[..., tuple[Any, str]], list[Any]]],
) -> None:
    lock = threading.Lock()
    value: Any = lock
    path = ""
    for wrap, others in layers:
        value, step = wrap(value, others)
        path = step + path
    with pytest.raises(PicklingFailed) as caught:
        dumps(value, "the_value")
    told, _, reason = str(caught.value).partition(" cannot be pickled: ")
    assert told == f"the_value{path}"
    assert eval(told, {"the_value": value}) is lock  # noqa: S307 - it is Python, made above
    assert reason.startswith("lock object (TypeError: ")


class Slotted:
    __slots__ = ("lock",)

    def __init__(self) -> None:
        self.lock = threading.Lock()


class CallableBox(Box):
    def __call__(self, job: Any) -> Any:
        return self.content

    def method(self, job: Any) -> Any:
        return self.content


def _refuse(kind: str) -> Any:
    return runfunctions.WrongWhenPickled(kind)


def _closure() -> Any:
    held = {"inner": threading.Lock()}
    return lambda: held


def _nested_closure() -> Any:
    held = threading.Lock()

    def inner() -> Any:
        return held

    def outer() -> Any:
        return [inner()]

    return outer


def _default() -> Any:
    def function(job: Any, held: Any = threading.Lock(), *, name: str = "x") -> Any:  # noqa: B008 - as people do
        return held

    return function


def _keyword_default() -> Any:
    def function(job: Any, *, name: str = "x", held: Any = threading.Lock()) -> Any:  # noqa: B008 - likewise
        return held

    return function


def _of_class() -> Any:
    class Base:
        lock = threading.Lock()

    class Local(Base):
        pass

    return Local()


def _cyclic() -> Any:
    cycle: list[Any] = [1]
    cycle.append(cycle)
    cycle.append({"lock": threading.Lock(), "cycle": cycle})
    return cycle


@pytest.mark.parametrize(
    ("make", "told"),
    [
        pytest.param(threading.Lock, "value cannot be pickled: lock object", id="itself"),
        pytest.param(_closure, "value (its variable 'held')['inner'] cannot be pickled: lock", id="closure"),
        pytest.param(
            _nested_closure,
            "value (its variable 'inner') (its variable 'held') cannot be pickled: lock",
            id="closure-in-closure",
        ),
        pytest.param(_default, "value (its default 0) cannot be pickled: lock", id="default-argument"),
        pytest.param(_keyword_default, "'held'", id="keyword-default"),
        pytest.param(lambda: functools.partial(print, threading.Lock()), "value.args[0] cannot", id="partial-argument"),
        pytest.param(
            lambda: functools.partial(print, end=threading.Lock()), "value.keywords['end'] cannot", id="partial-keyword"
        ),
        pytest.param(
            lambda: functools.partial(_closure()), "value.func (its variable 'held')['inner'] cannot", id="partial"
        ),
        pytest.param(
            lambda: CallableBox([threading.Lock()]).method, "value.__self__.content[0] cannot be pickled", id="method"
        ),
        pytest.param(
            lambda: CallableBox([threading.Lock()]), "value.content[0] cannot be pickled", id="callable-object"
        ),
        pytest.param(Slotted, "value.lock cannot be pickled", id="slots"),
        pytest.param(_of_class, "value (its class 'Local') (its base 'Base').lock cannot be pickled: lock", id="class"),
        pytest.param(_cyclic, "value[2]['lock'] cannot be pickled", id="cycle"),
        pytest.param(lambda: [{1, threading.Lock()}], "] cannot be pickled: lock object", id="set"),
        pytest.param(lambda: (number for number in range(2)), "value cannot be pickled: generator", id="generator"),
        pytest.param(
            lambda: [_refuse("raise")], "value[0] cannot be pickled: WrongWhenPickled object (ValueError: it", id="own"
        ),
        pytest.param(
            lambda: [_refuse("sys.exit")],
            "value[0] cannot be pickled: WrongWhenPickled object (SystemExit: it",
            id="exit",
        ),
        pytest.param(
            lambda: [_refuse("interrupt")],
            "value[0] cannot be pickled: WrongWhenPickled object (KeyboardInterrupt: it",
            id="interrupt",
        ),
    ],
)
def test_who_is_to_blame(make: Callable[[], Any], told: str) -> None:
    with pytest.raises(PicklingFailed) as caught:
        dumps(make(), "value")
    assert told in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_global_of_a_function_is_blamed_by_its_name() -> None:
    program = run_program(
        """
        import threading
        from paraval.worker.pickling import PicklingFailed, dumps

        LOCK = {"inner": threading.Lock()}

        def function(job):
            return LOCK

        try:
            dumps([function], "value")
        except PicklingFailed as exc:
            print(exc)
        """
    )
    (line,) = program.stdout
    assert line.startswith("value[0] (its global 'LOCK')['inner'] cannot be pickled: lock object (TypeError")


def test_very_deep_values_are_refused_or_cross() -> None:
    """In a program of its own: what it does to the interpreter's stack is no good for other tests."""
    program = run_program(
        """
        import pickle
        from paraval.worker.pickling import PicklingFailed, dumps
        for depth in (100, 100_000):
            value = []
            for _ in range(depth):
                value = [value]
            try:
                dumps(value, "value")
                print("crosses")
            except PicklingFailed as exc:
                print(str(exc).split(" (")[0])
        """
    )
    assert program.stdout == ["crosses", "value cannot be pickled: it is nested too deeply"], program.stderr


class Fickle:
    """Cannot be pickled, and can as soon as somebody looks more closely."""

    def __init__(self) -> None:
        self.calls = 0

    def __reduce__(self) -> Any:
        self.calls += 1
        if self.calls <= 2:  # once plainly, once by cloudpickle
            raise ValueError("not now")
        return Fickle, ()


def test_a_failure_that_does_not_come_again_is_told_of_the_whole() -> None:
    with pytest.raises(PicklingFailed, match=r"value cannot be pickled: list object \(ValueError: not now\)"):
        dumps([Fickle()], "value")


class Evasive:
    """Nobody may look at its attributes."""

    def __getattribute__(self, name: str) -> Any:
        raise RuntimeError(f"no {name} for you")


def test_objects_that_defend_themselves_are_named_nevertheless() -> None:
    with pytest.raises(PicklingFailed, match=r"value\['x'\] cannot be pickled: Evasive object"):
        dumps({"x": Evasive()}, "value")


def test_explain_may_be_asked_of_anything() -> None:
    text = explain({"x": [1, threading.Lock()]}, "the result", TypeError("no"))
    assert text.startswith("the result['x'][1] cannot be pickled: lock object")
    assert textwrap.dedent(text) == text
