"""What a submitter's script imports: `import ichiba; captured = ichiba.capture(model, loss, optimizer, example_batch)`.

A thin door to the packages behind it, which do the work; torch is imported at the first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from worker.capture import Captured, Training, capture
    from worker.capture_forward import Evaluation, Generation, Inference
    from worker.optimizers import Lion

__all__ = ["Captured", "Evaluation", "Generation", "Inference", "Lion", "Training", "capture"]

_HOMES = {
    "Captured": "worker.capture",
    "Evaluation": "worker.capture_forward",
    "Generation": "worker.capture_forward",
    "Inference": "worker.capture_forward",
    "Lion": "worker.optimizers",
    "Training": "worker.capture",
    "capture": "worker.capture",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ichiba' has no attribute {name!r}; it has {', '.join(__all__)}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
