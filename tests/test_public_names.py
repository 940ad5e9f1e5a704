"""The public names, where they can be imported from, and what importing them costs."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import pytest

import paraval

PUBLIC = {
    "paraval": {
        "Evaluator",
        "EvaluatorClosedError",
        "ExecutorEvaluator",
        "HPOJob",
        "Job",
        "JobError",
        "JobFailedError",
        "JobStatus",
        "JobTiming",
        "JobsFailedError",
        "LokyEvaluator",
        "MaximumJobsSpawnReached",
        "ParavalError",
        "ProcessPoolEvaluator",
        "RunningJob",
        "SerialEvaluator",
        "Statistics",
        "ThreadPoolEvaluator",
        "__version__",
        "callback",
        "errors",
        "parse_subprocess_result",
        "profile",
        "storage",
        "to_json",
        "utils",
    },
    "paraval.callback": {"CSVLoggerCallback", "Callback", "LoggerCallback", "SearchEarlyStopping", "TqdmCallback"},
    "paraval.errors": {
        "BadValueError",
        "CorruptStoreError",
        "EvaluatorClosedError",
        "ForkedError",
        "JobFailedError",
        "JobsFailedError",
        "MaximumJobsSpawnReached",
        "MissingExtraError",
        "ParavalError",
        "StorageError",
        "StoreAccessError",
        "StoreUnreachableError",
        "UsageError",
        "WrongStoreError",
        "WrongTypeError",
    },
    "paraval.storage": {
        "JobChange",
        "JobRecord",
        "MemoryStorage",
        "NullStorage",
        "RedisStorage",
        "SharedMemoryStorage",
        "SqliteStorage",
        "Storage",
        "UnknownIdError",
        "UnstorableError",
        "open_storage",
    },
}


@pytest.mark.parametrize("module", PUBLIC)
def test_the_public_names_are_these(module: str) -> None:
    # A star must work with the base install, so it leaves out what needs an extra.
    assert set(importlib.import_module(module).__all__) == PUBLIC[module] - {"LokyEvaluator"}


@pytest.mark.parametrize(("module", "name"), [(module, name) for module in PUBLIC for name in sorted(PUBLIC[module])])
def test_every_public_name_can_be_imported_and_is_documented(module: str, name: str) -> None:
    if name == "__version__":
        return
    try:
        value = getattr(importlib.import_module(module), name)
    except ImportError as exc:  # an optional one
        assert "paraval[" in str(exc)  # noqa: PT017 - whether it is raised depends on what is installed
    else:
        assert inspect.getdoc(value)


def test_the_names_can_be_listed() -> None:
    assert set(dir(paraval)) >= PUBLIC["paraval"]


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nope'"):
        _ = paraval.nope
    with pytest.raises(ImportError, match="nope"):
        from paraval import nope  # noqa: F401 - that is the point


def test_the_version_is_that_of_the_package() -> None:
    try:
        installed = version("paraval")
    except PackageNotFoundError:
        pytest.skip("the package is not installed: it was found on the path alone")
    assert paraval.__version__ == installed


def imported_by(statement: str) -> set[str]:
    """Give the names of the modules that a statement imports in a fresh interpreter."""
    program = f"import sys; before = set(sys.modules); {statement}; print(*(set(sys.modules) - before))"
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    return set(shown.stdout.split())


def test_importing_the_package_is_cheap() -> None:
    modules = imported_by("import paraval")
    assert {name for name in modules if name.partition(".")[0] == "paraval"} == {"paraval"}
    assert not modules & {"anyio", "msgspec", "asyncio", "trio", "typing", "numpy", "importlib.metadata", "inspect"}
    assert len(modules) < 15


@pytest.mark.parametrize("module", ["paraval.job", "paraval.outcome", "paraval.errors", "paraval.functions"])
def test_what_a_child_process_imports_is_light(module: str) -> None:
    modules = imported_by(f"import {module}")
    heavy = {"anyio", "sniffio", "msgspec", "asyncio", "trio", "numpy", "concurrent.futures", "multiprocessing"}
    assert not modules & heavy
    assert {name for name in modules if name.startswith("paraval")} <= {
        "paraval",
        "paraval.errors",
        "paraval.functions",
        "paraval.job",
        "paraval.outcome",
    }


def test_no_optional_dependency_is_imported_for_the_local_evaluators() -> None:
    program = (
        "import paraval\n"
        "def run(job): return 1.0\n"
        "with paraval.Evaluator.create(run, 'thread') as evaluator:\n"
        "    evaluator.submit([{}]); evaluator.gather('ALL')\n"
        "import sys; print(*sys.modules)"
    )
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    loaded = set(shown.stdout.split())
    assert not loaded & {
        "trio",
        "uvloop",
        "numpy",
        "loky",
        "ray",
        "mpi4py",
        "redis",
        "rich",
        "click",
        "tqdm",
        "sklearn",
    }
    assert "anyio" in loaded


def errors() -> list[type[Exception]]:
    values = vars(paraval.errors).values()
    return [value for value in values if inspect.isclass(value) and issubclass(value, Exception)]


@pytest.mark.parametrize("error", errors(), ids=lambda error: error.__name__)
def test_every_error_is_ours_and_a_built_in(error: Any) -> None:
    assert issubclass(error, paraval.ParavalError)
    built_in = (ValueError, TypeError, RuntimeError, OSError, ImportError, TimeoutError, ExceptionGroup)
    assert error is paraval.ParavalError or issubclass(error, built_in)


COMMON = ["run_function", "num_workers", "callbacks", "run_function_kwargs", "storage", "search_id"]
KEYWORDS = {"job_class", "job_timeout", "kill_grace", "max_attempts", "retry_on", "on_error", "max_pending", "batching"}


@pytest.mark.parametrize("name", ["SerialEvaluator", "ThreadPoolEvaluator"])
def test_the_arguments_have_the_same_names_everywhere(name: str) -> None:
    parameters = inspect.signature(getattr(paraval, name)).parameters
    positional = [name for name, parameter in parameters.items() if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
    keywords = {name for name, parameter in parameters.items() if parameter.kind is parameter.KEYWORD_ONLY}
    assert positional == COMMON
    assert keywords >= KEYWORDS


@pytest.mark.parametrize(
    ("name", "default"),
    [
        ("num_workers", 1),
        ("callbacks", None),
        ("run_function_kwargs", None),
        ("storage", None),
        ("search_id", None),
        ("job_class", paraval.Job),
        ("job_timeout", None),
        ("kill_grace", 1.0),
        ("max_attempts", 1),
        ("retry_on", ()),
        ("on_error", "record"),
        ("max_pending", None),
        ("batching", "auto"),
    ],
)
def test_the_arguments_have_their_fixed_defaults(name: str, default: Any) -> None:
    assert inspect.signature(paraval.Evaluator).parameters[name].default == default


METHODS = {
    "submit", "gather", "evaluate", "gather_other_jobs_done", "close", "statistics", "set_timeout",
    "set_maximum_num_jobs_submitted", "to_json", "dump_evals", "convert_for_csv", "decode", "create",
}  # fmt: skip
COROUTINES = {"submit_async", "gather_async", "evaluate_async", "gather_other_jobs_done_async", "aclose", "execute"}
PROPERTIES = {
    "storage", "search_id", "callbacks", "timeout", "time_left", "num_jobs_submitted", "num_jobs_gathered", "is_master",
    "job_class",
}  # fmt: skip
CONSTANTS = {"FAIL_RETURN_VALUE", "PYTHON_EXE", "NEST_ASYNCIO_PATCHED"}


def test_an_evaluator_has_these_methods() -> None:
    cls = paraval.Evaluator
    assert all(inspect.isfunction(getattr(cls, name)) for name in METHODS)
    assert all(inspect.iscoroutinefunction(getattr(cls, name)) for name in COROUTINES)
    assert not any(inspect.iscoroutinefunction(getattr(cls, name)) for name in METHODS)
    assert all(isinstance(inspect.getattr_static(cls, name), property) for name in PROPERTIES)
    assert all(hasattr(cls, name) for name in CONSTANTS)
    assert all(inspect.getdoc(getattr(cls, name)) for name in METHODS | COROUTINES | PROPERTIES)
    assert hasattr(cls, "as_completed")
