"""The project's chores. Plain ``nox`` runs the tests on the Python that runs nox; ``nox -l`` lists the rest."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import nox

nox.needs_version = ">=2025.2.9"  # sessions that require others

PROJECT = nox.project.load_toml("pyproject.toml")
SUPPORTED = nox.project.python_versions(PROJECT)
CURRENT = f"{sys.version_info.major}.{sys.version_info.minor}"


def working_pythons() -> dict[str, str]:
    """Find the interpreters to test on.

    Returns:
        The executable of each supported version found, and of the Python that runs nox, which is always there, whatever
        it is called on the PATH.
    """
    found = {CURRENT: sys.executable}
    for version in SUPPORTED:
        for candidate in candidates(version):
            if version not in found and works(candidate, version):
                found[version] = candidate
    return found


def candidates(version: str) -> Iterator[str]:
    """Name the executables that may be Python ``version``: those on the PATH first, then those pyenv holds."""
    name = f"python{version}"
    for folder in os.get_exec_path():
        if path := shutil.which(name, path=folder):
            yield path
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    yield from sorted(map(str, pyenv.glob(f"versions/{version}.*/bin/{name}")))


def works(python: str, version: str) -> bool:
    """Whether ``python`` really starts as that version: a pyenv shim may exist for a version that is not active."""
    probe = "import ssl, sys; print('%d.%d' % sys.version_info[:2])"
    try:
        shown = subprocess.run([python, "-c", probe], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return shown.returncode == 0 and shown.stdout.strip() == version


PYTHONS = working_pythons()
SIDE_BY_SIDE = ("-n", "2", "--dist", "worksteal")
INSTALLED_ONLY = {"PYTHONPATH": None}  # what is tested is what was installed, whatever the caller's path says
nox.options.sessions = [f"tests-{CURRENT}"]


def groups(*names: str) -> tuple[str, ...]:
    """What the dependency groups of these names hold."""
    return nox.project.dependency_groups(PROJECT, *names)


def run_tests(session: nox.Session) -> None:
    """Run all tests against the installed package, with every extra."""
    # scikit-learn comes along: the digits example is the main job, and a test of it that always skips proves nothing.
    session.install(".[all,examples]", *groups("test"))
    session.run("python", "-m", "pytest", *SIDE_BY_SIDE, *session.posargs, env=INSTALLED_ONLY)


for _version, _python in PYTHONS.items():
    # The interpreter goes by its path, so that nox need not find it again by a name that may be missing or a dead shim.
    nox.session(name=f"tests-{_version}", python=None if _version == CURRENT else _python)(run_tests)


@nox.session(python=False, requires=[f"tests-{version}" for version in PYTHONS])
def tests(session: nox.Session) -> None:
    """Run the tests on every supported Python that is really there."""
    session.log(f"tested on Python {', '.join(PYTHONS)}")


@nox.session
def kills(session: nox.Session) -> None:
    """Kill a driver 3,000 times, and see that it always goes on where it was."""
    session.install(".[all]", *groups("test"))
    env = {**INSTALLED_ONLY, "PARAVAL_KILLS": "3000"}
    session.run("python", "-m", "pytest", "tests/test_kill_loop.py", *session.posargs, env=env)


@nox.session
def lint(session: nox.Session) -> None:
    """Check the style and the format of all Python files."""
    session.install(*groups("lint"))
    session.run("ruff", "check", *session.posargs)
    session.run("ruff", "format", "--check")


@nox.session
def typing(session: nox.Session) -> None:
    """Check the types, strictly."""
    session.install(".[all]", *groups("typing"))
    session.run("mypy", "--strict", *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation; a warning is an error."""
    session.install(".[all]", *groups("docs"))
    session.run("sphinx-build", "-W", "--keep-going", "-b", "html", "docs", "docs/_build/html", *session.posargs)


@nox.session
def wheel(session: nox.Session) -> None:
    """Build the wheel and test it without any extra: what needs one must skip and say so."""
    dist = Path(session.create_tmp())
    for old in dist.glob("*.whl"):
        old.unlink()
    session.run("python", "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(dist), ".")
    (built,) = dist.glob("*.whl")
    session.install(str(built), *groups("test-base"))
    session.run("python", "-m", "pytest", *SIDE_BY_SIDE, *session.posargs, env=INSTALLED_ONLY)


@nox.session
def benchmarks(session: nox.Session) -> None:
    """Measure paraval beside its peers, which are installed for real."""
    session.install(".[all]", *groups("benchmarks"))
    session.run("python", "benchmarks/run.py", *session.posargs, env=INSTALLED_ONLY)
