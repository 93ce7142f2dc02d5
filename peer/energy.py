"""What a guest's work drew, by day: seconds of work, and joules with who says so. A small JSON file; pure but for it.

Each look adds the time since the last one while work ran, at the watts that the owner states, or else at what the
graphics cards draw then. What is only stated is told apart from what is measured, and neither is more than it is: cards
measure themselves, not the machine around them.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import msgspec

from protocol import params
from protocol.errors import CorruptStore

__all__ = ["Day", "EnergyBook", "read_book", "write_book"]

_Seconds = Annotated[float, msgspec.Meta(ge=0, le=1e12)]


class Day(msgspec.Struct, forbid_unknown_fields=True):
    """Of one local day: work in seconds; energy in joules, by who says it; work of which nothing is known."""

    work_s: _Seconds = 0.0
    measured_j: _Seconds = 0.0
    configured_j: _Seconds = 0.0
    unknown_s: _Seconds = 0.0


class EnergyBook(msgspec.Struct, forbid_unknown_fields=True):
    """Days by their ISO date, the latest params.GUEST_DAYS_KEPT_MAX of them."""

    days: dict[Annotated[str, msgspec.Meta(pattern=r"^\d{4}-\d\d-\d\d$")], Day] = msgspec.field(default_factory=dict)

    def add(self, day: str, seconds: float, *, configured_w: int | None, measured_w: float | None) -> None:
        """Work of so many seconds. A look that came late counts as one in time: the machine may have slept."""
        seconds = min(max(0.0, seconds), 3 * params.GUEST_READ_SECONDS)
        entry = self.days.setdefault(day, Day())
        entry.work_s += seconds
        if configured_w is not None:
            entry.configured_j += seconds * configured_w
        elif measured_w is not None:
            entry.measured_j += seconds * measured_w
        else:
            entry.unknown_s += seconds
        while len(self.days) > params.GUEST_DAYS_KEPT_MAX:
            del self.days[min(self.days)]


def read_book(path: Path) -> EnergyBook:
    """The book, empty where there is none. Raises CorruptStore."""
    try:
        with path.open("rb") as file:
            return msgspec.json.decode(file.read(params.GUEST_BOOK_BYTES_MAX), type=EnergyBook)
    except FileNotFoundError:
        return EnergyBook()
    except (msgspec.DecodeError, UnicodeDecodeError, OSError) as error:
        raise CorruptStore(
            f"{path} does not read back", why=str(error)[:200], next_step=f"move it away: mv {path} {path}.damaged"
        ) from None


def write_book(path: Path, book: EnergyBook) -> None:
    """Replace the file, whole or not at all. Raises OSError."""
    part = path.with_suffix(".part")
    part.write_bytes(msgspec.json.format(msgspec.json.encode(book), indent=1))
    os.replace(part, path)
