"""What a script's supervisor may say, checked outside: one Exited, then outputs with their bytes, then Done.

All of it is hostile: the script may have taken its supervisor's place. Names, counts, sizes and order are bounded
here before a byte is kept. Sans-IO: it knows nothing of pipes or files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from protocol import params
from protocol.errors import MalformedRecord
from protocol.script import OutputFile, check_path
from worker.frames import BadReply, CheckpointBytes, Done, Exited, Frames, Output

__all__ = ["ScriptTalk"]


@dataclass
class ScriptTalk:
    """Feed it the bytes of the replies after Ready; `take` gives the bytes of outputs to keep, in order.

    Raises BadReply for anything else than what may come. `files` lists the outputs that are whole; `kept_bytes` is
    their size, so whatever was kept beyond it belongs to a broken one.
    """

    outputs_bytes_max: int
    exited: Exited | None = None
    files: list[OutputFile] = field(default_factory=list)
    kept_bytes: int = 0
    finished: bool = False
    _frames: Frames = field(default_factory=Frames)
    _open: Output | None = None
    _hash: Any = None

    def take(self, data: bytes) -> Iterator[bytes]:
        """Parts of outputs in `data`, lazily: use each before asking for the next."""
        for event in self._frames.feed(data):
            if self.finished:
                raise BadReply("extra-bytes", "the supervisor went on talking after it had ended the job")
            if isinstance(event, CheckpointBytes):
                self._hash.update(event.part)
                yield event.part
                if event.last:
                    self._close()
            elif isinstance(event, Exited) and self.exited is None:
                self.exited = event
            elif isinstance(event, Output) and self.exited is not None:
                self._begin(event)
            elif isinstance(event, Done) and self.exited is not None:
                self.finished = True
            else:
                raise BadReply("wrong-reply", f"{type(event).__name__.lower()} is not what may come next")

    def _begin(self, output: Output) -> None:
        try:
            check_path(output.name)
        except MalformedRecord as error:
            raise BadReply("wrong-reply", f"an output of a bad name: {error.what}") from None
        if self.files and output.name <= self.files[-1].name:
            raise BadReply("wrong-reply", f"output {output.name!r} comes out of order")
        if len(self.files) >= params.SCRIPT_OUTPUTS_MAX:
            raise BadReply("wrong-reply", f"more than {params.SCRIPT_OUTPUTS_MAX} outputs")
        if self.kept_bytes + output.size_bytes > self.outputs_bytes_max:
            raise BadReply("wrong-reply", f"outputs of more than the {self.outputs_bytes_max} bytes ordered")
        self._open, self._hash = output, hashlib.blake2b(digest_size=32)
        self._frames.raw_left = output.size_bytes
        if not output.size_bytes:
            self._close()

    def _close(self) -> None:
        output = self._open
        assert output is not None, "bytes come after their header"
        self.files.append(OutputFile(output.name, output.size_bytes, self._hash.digest()))
        self.kept_bytes += output.size_bytes
        self._open = None
