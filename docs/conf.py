"""How Sphinx builds the documentation."""

from __future__ import annotations

import importlib
import tomllib
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util import logging

import paraval

project = "paraval"
author = "The paraval authors"
project_copyright = author
release = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text("utf-8"))["project"]["version"]
version = release

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
]
exclude_patterns = ["_build"]
default_role = "py:obj"

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "show-inheritance": True}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True

html_theme = "furo"
html_title = f"paraval {release}"


def warn_of_undocumented_names(_app: Sphinx, env: BuildEnvironment) -> None:
    """Warn of each public name that the reference does not have; under ``-W``, which nox uses, that is an error."""
    modules = {"paraval": dir(paraval)} | {
        f"paraval.{name}": importlib.import_module(f"paraval.{name}").__all__ for name in paraval._SUBMODULES
    }
    documented = {name for name, *_ in env.get_domain("py").get_objects()}
    for module, names in modules.items():
        for name in sorted({f"{module}.{name}" for name in names} - documented - {"paraval.__version__"}):
            logging.getLogger(__name__).warning("%s is public, and the reference does not have it", name)


def setup(app: Sphinx) -> None:
    """Have the reference checked against the package."""
    app.connect("env-check-consistency", warn_of_undocumented_names)
