"""Blobs that the node asks for: brought here, and what they claim to be checked before it hears of them."""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import trio

from peer.blobs import BlobStore
from peer.events import BlobRead, Fetch, Fetched, Input, ReadBlob
from peer.host import Host
from peer.link_meter import LinkMeter
from peer.run_events import LinkEnds
from protocol import params
from protocol.errors import IchibaError, MalformedRecord, VerificationFailed
from protocol.merkle import state_root
from protocol.program import Program, state_layout
from protocol.safetensors import parse
from protocol.script import result_from, words_for
from protocol.stage import RECEIVED, SENT, TAPE

__all__ = ["Fetcher", "check_checkpoint", "link_ends"]


def check_checkpoint(path: Path, program: Path, root: bytes) -> None:
    """Raise a RemoteProtocolError unless the file is a checkpoint of this Program with this state root.

    Reads the whole file: call it in a thread. Raises OSError if a file is gone.
    """
    layout = state_layout(Program.from_bytes(program.read_bytes()))
    found = state_root(parse(memoryview(path.read_bytes()), layout))
    if found != root:
        raise VerificationFailed(f"checkpoint has state root {found.hex()[:12]}, its receipt says {root.hex()[:12]}")


def check_script_result(path: Path, root: bytes) -> str:
    """How the script ended, in words. Raises a RemoteProtocolError unless the file is a result of this root.

    Reads the whole file: call it in a thread.
    """
    result = result_from(path.read_bytes())
    if result.root != root:
        raise VerificationFailed(f"outputs have root {result.root.hex()[:12]}, their receipt says {root.hex()[:12]}")
    return words_for(result)


def link_ends(path: Path) -> LinkEnds:
    """What the checkpoint of a unit says of its links. Raises MalformedRecord where it says nothing; OSError.

    Maps the file: call it in a thread.
    """
    with path.open("rb") as file:
        data = memoryview(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ))
    tensors = parse(data)
    rows = [tensors.get(name) for name in (SENT, RECEIVED, TAPE)]
    if any(row is None or row.dtype != np.uint8 for row in rows):
        raise MalformedRecord("a checkpoint without the hashes of what went over a unit's links")
    return LinkEnds(*(row.tobytes() for row in rows if row is not None))


@dataclass
class Fetcher:
    """Fetches for one node, over `host` into `blobs`; answers go to `inbox`."""

    host: Host
    blobs: BlobStore
    inbox: trio.MemorySendChannel[Input]

    async def fetch(self, effect: Fetch) -> None:
        """Bring a blob here and check it; answered by one Fetched."""
        error, forged, note, meter = "", False, "", LinkMeter(effect.peers)
        ends: LinkEnds | None = None
        bring = partial(self.blobs.fetch, self.host, peers=effect.peers, keys=effect.keys)
        try:
            if not self.blobs.has(effect.blob):
                await bring(effect.blob, size_max=effect.size_max, progress=meter)
            self.blobs.pin(effect.blob, effect.token.hex())
            if effect.state_root and not effect.program:
                check_result = partial(check_script_result, self.blobs.path(effect.blob), effect.state_root)
                note = await trio.to_thread.run_sync(check_result)
            elif effect.state_root:
                # The program says what the checkpoint must hold; it may still be on its way in another fetch.
                await bring(effect.program, size_max=params.PROGRAM_BYTES_MAX)
                check = partial(
                    check_checkpoint, self.blobs.path(effect.blob), self.blobs.path(effect.program), effect.state_root
                )
                await trio.to_thread.run_sync(check)
            if effect.links:
                ends = await trio.to_thread.run_sync(link_ends, self.blobs.path(effect.blob))
        except VerificationFailed as failure:
            error, forged = str(failure), True
        except (IchibaError, OSError) as failure:
            error = str(failure)
        await self.inbox.send(Fetched(effect.blob, effect.token, error, forged, note, *meter.told(), ends))

    async def read(self, effect: ReadBlob) -> None:
        """Give the node the bytes of a blob; answered by one BlobRead."""
        data, error = b"", ""
        try:
            path = self.blobs.path(effect.blob)
            if path.stat().st_size > effect.size_max:
                error = f"it is larger than {effect.size_max} bytes"
            else:
                data = await trio.to_thread.run_sync(path.read_bytes)
        except (IchibaError, OSError) as failure:
            error = str(failure)
        await self.inbox.send(BlobRead(effect.blob, effect.token, data, error))
