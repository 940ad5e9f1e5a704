"""The engine: the task group, dispatch and batches, deadlines, settling, the ledger, and who owns the loop."""

from paraval.engine.batching import Batching
from paraval.engine.engine import Engine, EngineSettings
from paraval.engine.gathered import Gathered
from paraval.engine.intake import Intake
from paraval.engine.ledger import Gate, Ledger, Statistics
from paraval.engine.lifecycle import Lifecycle
from paraval.engine.notify import Notifier
from paraval.engine.others import Others

__all__ = [
    "Batching",
    "Engine",
    "EngineSettings",
    "Gate",
    "Gathered",
    "Intake",
    "Ledger",
    "Lifecycle",
    "Notifier",
    "Others",
    "Statistics",
]
