"""Links that are slow as real ones are: each daemon in a network namespace of its own, joined by a relay of packets.

Unlike peer/link_shaper.py, which sits in the daemons, this is a network to them: TCP has its own congestion control,
queues and losses, and all that a peer sends shares one uplink. Promises: what `open` gives has passed a datagram from
each namespace to the next and a stream between two (the canary), else NoNamespaces says why not; no namespace has a
name, so when the last process in it, the relay and we are gone, however killed, nothing is left. Needs root and
/dev/net/tun; refuses to be anything without. How packets wait is peer/packet_lines.py, who carries them
peer/packet_relay.py.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

from protocol.errors import IchibaError

__all__ = ["LinkNamespaces", "NoNamespaces", "inside"]

SUBNET: Final = "10.77.0"  # nobody outside ever sees it
NAMESPACES_MAX: Final = 64
READY_SECONDS_MAX: Final = 30.0  # an interpreter starts in 0.1 s, on a busy machine in ten times that
CANARY_SECONDS_MAX: Final = 10.0  # beside what the delay and the rate themselves take
CANARY_BYTES: Final = 64 * 1024  # of the stream: more than one segment, so that cutting them is tried too
END_SECONDS_MAX: Final = 5.0
_NEW_NETWORK: Final = 0x40000000  # CLONE_NEWNET
_OWN: Final = "/proc/thread-self/ns/net"


class NoNamespaces(IchibaError):
    """This machine, or this user, cannot have them."""

    code = "link-namespaces"


@contextmanager
def inside(namespace: int) -> Iterator[None]:
    """This thread is in the network namespace of a descriptor within the block: the sockets, devices and processes that
    it makes there belong to it. Raises OSError."""
    own = os.open(_OWN, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _call("setns", namespace, _NEW_NETWORK)
        try:
            yield
        finally:
            _call("setns", own, _NEW_NETWORK)
    finally:
        os.close(own)


def _made() -> int:
    """A descriptor of a new network namespace. Raises OSError."""
    own = os.open(_OWN, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _call("unshare", _NEW_NETWORK)
        try:
            return os.open(_OWN, os.O_RDONLY | os.O_CLOEXEC)
        finally:
            _call("setns", own, _NEW_NETWORK)
    finally:
        os.close(own)


def _call(name: str, *arguments: int) -> None:
    """setns(2), unshare(2): Python has them from 3.12 on. Only the calling thread moves."""
    if getattr(ctypes.CDLL(None, use_errno=True), name)(*arguments):
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


class LinkNamespaces:
    """Namespaces by name and the relay between them. Make it with `open`, end it with `close`."""

    def __init__(self) -> None:
        self._namespaces: dict[str, int] = {}
        self._relay: subprocess.Popen[bytes] | None = None
        self._heard = b""

    @classmethod
    def open(cls, names: Sequence[str], *, bits_per_second: int, delay_ns: int, log: Path) -> LinkNamespaces:
        """A namespace for each name, whose uplink and downlink have this rate (0: no bound), delay_ns between any two.

        log: what the relay says when it dies. Raises NoNamespaces, with nothing left behind.
        """
        assert 2 <= len(names) <= NAMESPACES_MAX
        made = cls()
        with ExitStack() as stack:
            stack.callback(made.close)
            try:
                for name in names:
                    made._namespaces[name] = _made()
                made._start(bits_per_second, delay_ns, log)
                made._canary(delay_ns / 1e9, 8 * CANARY_BYTES / bits_per_second if bits_per_second else 0.0)
            except OSError as error:
                raise NoNamespaces(
                    "this process cannot make network namespaces",
                    why=str(error),
                    next_step="run it as root, on Linux with /dev/net/tun",
                ) from None
            stack.pop_all()
        return made

    def host_of(self, name: str) -> str:
        """The IPv4 address of a namespace."""
        return f"{SUBNET}.{list(self._namespaces).index(name) + 1}"

    @contextmanager
    def entered(self, name: str) -> Iterator[None]:
        """As `inside`, by name."""
        with inside(self._namespaces[name]):
            yield

    def _start(self, bits_per_second: int, delay_ns: int, log: Path) -> None:
        with log.open("ab") as said:
            self._relay = subprocess.Popen(
                [sys.executable, "-P", "-m", "peer.packet_relay"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=said,
                start_new_session=True,
                pass_fds=list(self._namespaces.values()),
            )
        places = [[namespace, self.host_of(name)] for name, namespace in self._namespaces.items()]
        answer = self._ask(json.dumps({"bits_per_second": bits_per_second, "delay_ns": delay_ns, "namespaces": places}))
        if "error" in answer:
            raise NoNamespaces(
                "the network namespaces cannot be joined",
                why=answer["error"],
                next_step="see that /dev/net/tun is there",
            )

    def _canary(self, delay_s: float, sending_s: float) -> None:
        """Raise NoNamespaces unless packets pass: a datagram to each, and a stream."""
        names = list(self._namespaces)
        deadline = time.monotonic() + CANARY_SECONDS_MAX + 8 * (delay_s + sending_s)
        with ExitStack() as stack:
            sockets = []
            for name in names:
                with self.entered(name):
                    sockets.append(stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)))
                sockets[-1].bind((self.host_of(name), 0))
            for place, one in enumerate(sockets):
                one.sendto(b"canary", sockets[(place + 1) % len(sockets)].getsockname())
            waiting = list(sockets)
            while waiting:
                heard, _, _ = select.select(waiting, [], [], max(0.0, deadline - time.monotonic()))
                if not heard:
                    raise _silent(f"{len(waiting)} of {len(names)} namespaces hear no datagram")
                waiting = [one for one in waiting if one not in heard]
            self._stream(stack, names[0], names[1], deadline)

    def _stream(self, stack: ExitStack, near: str, far: str, deadline: float) -> None:
        with self.entered(far):
            listener = stack.enter_context(socket.create_server((self.host_of(far), 0)))
        with self.entered(near):
            sender = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_STREAM))
        try:
            for one in (sender, listener):
                one.settimeout(max(0.001, deadline - time.monotonic()))
            sender.connect(listener.getsockname())
            receiver = stack.enter_context(listener.accept()[0])
            sender.setblocking(False)  # it fits in the kernel's buffers, or some of it does: that is enough
            sent, got = sender.send(bytes(CANARY_BYTES)), 0
            while got < sent:
                receiver.settimeout(max(0.001, deadline - time.monotonic()))
                data = receiver.recv(CANARY_BYTES)
                if not data:
                    raise _silent("a stream between two namespaces ends by itself")
                got += len(data)
        except TimeoutError:
            raise _silent("a stream between two namespaces stands still") from None

    def _ask(self, words: str) -> dict[str, Any]:
        """Tell the relay a line, and hear one. Raises NoNamespaces if it is gone or silent."""
        assert self._relay is not None
        assert self._relay.stdin is not None
        assert self._relay.stdout is not None
        deadline = time.monotonic() + READY_SECONDS_MAX
        try:
            os.write(self._relay.stdin.fileno(), words.encode() + b"\n")
        except BrokenPipeError:
            raise _silent("the relay has ended") from None
        while b"\n" not in self._heard:
            ready, _, _ = select.select([self._relay.stdout], [], [], max(0.0, deadline - time.monotonic()))
            data = os.read(self._relay.stdout.fileno(), 1 << 16) if ready else b""
            if not data:
                raise _silent("the relay has ended" if ready else "the relay does not answer")
            self._heard += data
        line, _, self._heard = self._heard.partition(b"\n")
        answer = json.loads(line)
        assert isinstance(answer, dict)
        return answer

    def counters(self) -> dict[str, Any]:
        """What the relay has counted (peer/packet_lines.py), and `processor_ns`, what it took for it."""
        return self._ask("counters")

    def check(self) -> None:
        """Raise NoNamespaces if the relay has ended: nothing passes any more."""
        if self._relay is None or self._relay.poll() is not None:
            raise _silent("the relay has ended")

    def close(self) -> None:
        """End the relay and let go of the namespaces, which vanish with their last process. Harmless twice."""
        if self._relay is not None:
            for pipe in (self._relay.stdin, self._relay.stdout):
                assert pipe is not None
                pipe.close()
            try:
                self._relay.wait(END_SECONDS_MAX)
            except subprocess.TimeoutExpired:
                self._relay.kill()
                self._relay.wait()
            self._relay = None
        while self._namespaces:
            os.close(self._namespaces.popitem()[1])


def _silent(what: str) -> NoNamespaces:
    return NoNamespaces("the network namespaces are not joined", why=what, next_step="see the relay's log")
