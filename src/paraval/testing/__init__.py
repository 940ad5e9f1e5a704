"""What a storage of a third party is tested with: a suite, and a state machine. They need the extra ``testing``.

.. code-block:: python

    from paraval.testing import StorageConformance, storage_machine

    class TestMyStorage(StorageConformance):
        def make_storage(self):
            return MyStorage()

    TestMyStorageAtRandom = storage_machine(MyStorage).TestCase
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Final

from paraval.errors import MissingExtraError

if TYPE_CHECKING:
    from paraval.testing.conformance import StorageConformance as StorageConformance
    from paraval.testing.machine import storage_machine as storage_machine

__all__ = ["StorageConformance", "storage_machine"]

_NEEDS: Final = {"StorageConformance": ("conformance", "pytest"), "storage_machine": ("machine", "hypothesis")}


def __getattr__(name: str) -> Any:
    if name not in _NEEDS:
        raise AttributeError(f"module 'paraval.testing' has no attribute {name!r}")
    module, needed = _NEEDS[name]
    try:
        importlib.import_module(needed)
    except ImportError as exc:
        raise MissingExtraError(f"paraval.testing.{name} needs {needed}: pip install 'paraval[testing]'") from exc
    if needed == "pytest":
        import pytest

        parts = ("conformance", "keeping", "asking", "sharing")
        pytest.register_assert_rewrite(*(f"paraval.testing.{part}" for part in parts))  # a failure shows what differs
    value = globals()[name] = getattr(importlib.import_module(f"paraval.testing.{module}"), name)
    return value
