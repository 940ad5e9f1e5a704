"""Without the extra, the command says what to install."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from commandline import CommandLine


@pytest.mark.parametrize(("modules", "named"), [(["click", "rich"], "click and rich"), (["rich"], "rich")])
def test_the_extra_is_named(tmp_path: Path, modules: list[str], named: str) -> None:
    if modules == ["rich"]:
        pytest.importorskip("click", reason="without the extra 'cli' both are missing")
    # A module that is None cannot be imported: as if it were not installed.
    script = f"import sys; sys.modules.update(dict.fromkeys({modules})); from paraval.cli import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        env=CommandLine(tmp_path).environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == f"paraval: error: the command line needs {named}: pip install 'paraval[cli]'\n"
