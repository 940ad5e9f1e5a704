"""The engine: the task group, dispatch and batches, deadlines, settling, the ledger, and who owns the loop."""

from paraval.engine.engine import Engine, EngineSettings
from paraval.engine.gathered import Gathered
from paraval.engine.intake import Intake, Launch
from paraval.engine.known.others import Others
from paraval.engine.ledger import Gate, Ledger, Statistics
from paraval.engine.life.lifecycle import Lifecycle
from paraval.engine.notify import Notifier
from paraval.engine.running.batching import Batching

__all__ = [
    "Batching",
    "Engine",
    "EngineSettings",
    "Gate",
    "Gathered",
    "Intake",
    "Launch",
    "Ledger",
    "Lifecycle",
    "Notifier",
    "Others",
    "Statistics",
]
