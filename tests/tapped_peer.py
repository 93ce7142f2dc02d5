"""A daemon as any other, beside which a folder grows with all that leaves it, as it was before it was encrypted.

    python -P tests/tapped_peer.py FOLDER up ...

Every protocol of a host goes out through the Noise wire of a connection (peer/noise_wire.py), so this is the one place
to look: FOLDER gets a file a connection, the messages in their order.
"""

from __future__ import annotations

import itertools
import sys
from io import FileIO
from pathlib import Path

from peer.cli import main
from peer.noise_wire import NoiseWire

__all__ = ["tap"]


def tap(folder: Path) -> None:
    """From now on write down what this process sends."""
    folder.mkdir(parents=True)
    numbers, send = itertools.count(), NoiseWire.send
    files: dict[int, tuple[NoiseWire, FileIO]] = {}  # with the wire itself, so that its id is nobody else's later

    async def told(self: NoiseWire, data: bytes | memoryview, *more: bytes | memoryview) -> None:
        if id(self) not in files:
            files[id(self)] = self, FileIO(folder / f"connection-{next(numbers)}", "xb")
        files[id(self)][1].write(b"".join((data, *more)))
        await send(self, data, *more)

    NoiseWire.send = told  # type: ignore[method-assign]


if __name__ == "__main__":
    tap(Path(sys.argv.pop(1)))
    main()
