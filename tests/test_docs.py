"""The documentation: what its pages show runs as it stands, and what they say of the code is so.

Every block of code on every page is run, by its language:

``python``
    A program, run in a folder of its own, warnings being errors; with an ``await`` outside any function it is a cell of
    a notebook. One that begins with ``# name.py`` is a file, for the shell commands of the page. One that begins with
    ``# needs: package`` is left out where that package is not installed.
``shell``
    Commands, run in a folder that the shell blocks of a page share with its files and with the examples.
``text``
    Directly behind one of these: what it prints, ``...`` standing for anything.
"""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

import paraval
from paraval.registry import methods

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
TIME_S = 50

has_command_line = pytest.mark.skipif(
    any(importlib.util.find_spec(module) is None for module in ("click", "rich")),
    reason="click and rich are not installed (extra 'cli')",
)


class Block(NamedTuple):
    """A block of code; ``shows`` is the text directly behind it."""

    language: str
    code: str
    shows: str | None

    @property
    def file(self) -> str | None:
        found = re.match(r"# (\w+\.py)\n", self.code)
        return found[1] if found is not None and self.language == "python" else None


def blocks(page: Path) -> list[Block]:
    fences = list(re.finditer(r"^```(\S*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL))
    found = []
    for fence, following in zip(fences, [*fences[1:], None], strict=True):
        shows = None
        if (
            following is not None
            and following[1] == "text"
            and not fence.string[fence.end() : following.start()].strip()
        ):
            shows = following[2]
        found.append(Block(fence[1], fence[2], shows))
    return found


def programs() -> Iterator[object]:
    for page in PAGES:
        for number, block in enumerate(blocks(page)):
            if block.language == "python" and block.file is None:
                yield pytest.param(block, id=f"{page.stem}-{number}")


def commands() -> Iterator[object]:
    for page in PAGES:
        # Those of the README are run by the people it is for, and in part by test_examples.py: they install paraval.
        if page.parent == DOCS and any(block.language == "shell" for block in blocks(page)):
            yield pytest.param(page, id=page.stem)


def run(*command: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    ran = subprocess.run(
        [*map(str, command)],
        cwd=cwd,
        env=os.environ | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        timeout=TIME_S,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert "Traceback" not in ran.stderr
    assert "Warning" not in ran.stderr
    return ran


def assert_shown(block: Block, printed: str) -> None:
    if block.shows is not None:
        same = doctest.OutputChecker().check_output(block.shows, printed, doctest.ELLIPSIS)
        assert same, f"the page shows\n{block.shows}\nand it printed\n{printed}"


# As a notebook runs a cell: with its loop running, and `await` allowed.
CELL = """
import ast, asyncio, pathlib, sys
code = compile(pathlib.Path(sys.argv[1]).read_text(), sys.argv[1], "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
async def cell():
    if (waiting := eval(code, {"__name__": "__main__"})) is not None:
        await waiting
asyncio.run(cell())
"""


def printed_by(block: Block, folder: Path) -> str:
    file = folder / "program.py"
    file.write_text(block.code, encoding="utf-8")
    is_cell = re.search(r"^(\w+ = )?(await|async with|async for) ", block.code, re.MULTILINE)
    command: list[str | Path] = [sys.executable, "-W", "error", *(["-c", CELL] if is_cell else []), file]
    return run(*command, cwd=folder).stdout


@pytest.fixture(scope="module")
def printed(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[Block, Future[str]]]:
    """Run all programs that are to be tested: several at a time, as most of them wait for most of their time."""
    wanted = [item.callspec.params.get("block") for item in request.session.items if hasattr(item, "callspec")]
    with ThreadPoolExecutor(3) as pool:
        yield {
            block: pool.submit(printed_by, block, tmp_path_factory.mktemp("program"))
            for block in wanted
            if isinstance(block, Block) and not missing(block)
        }


def missing(block: Block) -> list[str]:
    needed = re.findall(r"^# needs: (\w+)$", block.code, re.MULTILINE)
    return [package for package in needed if importlib.util.find_spec(package) is None]


@pytest.mark.parametrize("block", list(programs()))
def test_a_program_runs_as_it_stands(block: Block, printed: dict[Block, Future[str]]) -> None:
    if missing(block):
        pytest.skip(f"not installed: {missing(block)}")
    assert_shown(block, printed[block].result())


@has_command_line
@pytest.mark.parametrize("page", list(commands()))
def test_the_commands_of_a_page_run_in_their_order(page: Path, tmp_path: Path) -> None:
    folder, scripts = tmp_path / "folder", tmp_path / "bin"
    scripts.mkdir()
    shutil.copytree(ROOT / "examples", folder / "examples")
    for name, command in (("python", ""), ("paraval", "-m paraval")):
        (scripts / name).write_text(f'#!/bin/sh\nexec {sys.executable} {command} "$@"\n')
        (scripts / name).chmod(0o755)
    source = str(Path(paraval.__file__).resolve().parents[1])
    environment = {"PATH": f"{scripts}:{os.environ['PATH']}", "PYTHONPATH": source, "PYTHONIOENCODING": "utf-8"}
    for block in blocks(page):
        if block.file is not None:
            (folder / block.file).write_text(block.code, encoding="utf-8")
        elif block.language == "shell" and "pip install" not in block.code:
            ran = run("bash", "-e", "-o", "pipefail", "-c", block.code, cwd=folder, **environment)
            assert_shown(block, ran.stdout)


def test_no_block_escapes() -> None:
    languages = {block.language for page in PAGES for block in blocks(page)}
    assert languages <= {"python", "shell", "text", "", "{toctree}", "{eval-rst}"}


def test_every_page_can_be_reached() -> None:
    listed = {
        name for block in blocks(DOCS / "index.md") if block.language == "{toctree}" for name in block.code.split()
    }
    assert {page.stem for page in DOCS.glob("*.md")} - {"index"} <= listed


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


# -- what the pages say of the code ------------------------------------------------------------------------------------


def table(page: str, heading: str) -> list[dict[str, str]]:
    """Read the first table under a heading."""
    text = (DOCS / page).read_text(encoding="utf-8")
    lines = re.search(r"(?:^\|.*\n)+", text.partition(f"# {heading}\n")[2], re.MULTILINE)
    assert lines is not None, f"{page} has no table under '{heading}'"
    rows = [[cell.strip(' `"') for cell in line.strip("|").split(" | ")] for line in lines[0].splitlines()]
    return [dict(zip(rows[0], row, strict=True)) for row in rows[2:]]


def test_the_table_of_backends_is_that_of_the_classes() -> None:
    rows = {row["method"]: row for row in table("backends.md", "What each of them can do")}
    assert list(rows) == list(methods())
    for name, method in methods().items():
        if method.missing is not None:
            continue
        cls = method.load()
        assert (
            rows[name]
            | {
                "class": cls.__name__,
                "jobs run in": cls.parallel,
                "cancellation": cls.cancellation,
                "lambdas, closures": "yes" if cls.closures else "no",
                "several machines": "yes" if cls.several_hosts else "no",
                "sees a job's memory": "its own worker's" if cls.watches_memory else "in a process for each call",
            }
            == rows[name]
        )


def test_the_readme_names_every_extra() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    (paragraph,) = re.findall(r"The extras are (.*?)\n\n", PAGES[0].read_text(encoding="utf-8"), re.DOTALL)
    assert set(re.findall(r"`([a-z]+)`", paragraph)) == set(extras)


def test_the_reference_has_every_public_name() -> None:
    text = (DOCS / "reference.md").read_text(encoding="utf-8")
    documented = set(re.findall(r"^\.\. auto(?:class|function|exception):: (\S+)$", text, re.MULTILINE))
    for module in re.findall(r"^\.\. automodule:: (\S+)$", text, re.MULTILINE):
        documented |= {module, *(f"{module}.{name}" for name in importlib.import_module(module).__all__)}
    public = {f"paraval.{name}" for name in dir(paraval)} - {"paraval.__version__"}
    for name in paraval._SUBMODULES:
        public |= {f"paraval.{name}.{member}" for member in importlib.import_module(f"paraval.{name}").__all__}
    assert public - documented == set()
