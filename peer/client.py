"""The Python SDK: every call of the control socket as a plain function, without trio, torch or libp2p.

    with Client(data_dir) as ichiba:
        print(ichiba.status()["peer"])

Promises: an error of the daemon arrives as an IchibaError with its code and exit code; `events(follow=True)` gives
each event once, in order, across cut connections. Refuses to start a daemon. Written on the standard library's HTTP:
httpx takes 120 ms to import here (it brings trio and rich), more than all the rest of `ichiba status`.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from http.client import HTTPConnection, HTTPException, HTTPResponse
from pathlib import Path
from types import TracebackType
from typing import Any, Final
from urllib.parse import urlencode

from peer.socket_name import socket_name
from protocol import params
from protocol.errors import IchibaError

__all__ = ["Client", "CommandRefused", "ConnectionLost", "DaemonNotRunning"]

Progress = Callable[[int, int], None]
"""Called with bytes moved and bytes in all."""

_CALL_SECONDS: Final = 120.0  # a connect tries four addresses, 10 s each
_PAUSE_SECONDS: Final = 600.0  # the longest wait for workers, then their states to the disk at 30 MB/s or more
_UPLOAD_SECONDS: Final = 3600.0  # after the last byte the daemon hashes it all
_FRUITLESS_MAX: Final = 3  # connections in a row that gave nothing: then following is given up


class DaemonNotRunning(IchibaError):
    """Nobody answers on the control socket."""

    code = "daemon-not-running"
    exit_code = 3


class ConnectionLost(IchibaError):
    """The daemon stopped, or cut the connection, in the middle of a call."""

    code = "connection-lost"


class CommandRefused(IchibaError):
    """The daemon's own error, as it was."""

    def __init__(self, error: dict[str, Any]) -> None:
        super().__init__(
            str(error.get("what", "")), why=str(error.get("why", "")), next_step=str(error.get("next", ""))
        )
        self.code, self.exit_code = str(error.get("code", "error")), int(error.get("exit_code", 1))


class Client:
    """Calls to the daemon of `data_dir`."""

    def __init__(self, data_dir: Path) -> None:
        self.data_dir = data_dir

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing is held between calls."""

    # --- commands ------------------------------------------------------------------------------------------
    def command(self, verb: str, **arguments: Any) -> dict[str, Any]:
        """One verb of docs/control.md. Raises CommandRefused, DaemonNotRunning, ConnectionLost."""
        return self._json("POST", f"/v1/command/{verb}", arguments)

    def status(self) -> dict[str, Any]:
        """Who this peer is, whom it sees, what it does."""
        return self.command("status")

    def submit(
        self,
        *,
        task: bytes,
        budget_micro: int,
        unit_price_max: int,
        base_root: bytes,
        checkpoint_bytes: int,
        memory_bytes: int,
        sandbox: int = 2,
        sealed: bool = False,
        device: str = "any",
        device_memory_bytes: int = 0,
        deadline_ns: int = 0,
        credit: bool = False,
    ) -> dict[str, Any]:
        """Open a job; `task` is an encoded TaskSpec whose blobs were put before (if the job is sealed, sealed). Returns
        the job. credit: it is done by who gives this peer a credit line, and owed."""
        return self.command(
            "submit",
            task=task.hex(),
            budget_micro=budget_micro,
            unit_price_max=unit_price_max,
            base_root=base_root.hex(),
            checkpoint_bytes=checkpoint_bytes,
            memory_bytes=memory_bytes,
            sandbox=sandbox,
            sealed=sealed,
            device=device,
            device_memory_bytes=device_memory_bytes,
            deadline_ns=deadline_ns,
            **({"credit": True} if credit else {}),
        )

    def cancel(self, job: str) -> dict[str, Any]:
        """Stop a job; what is receipted is checked and paid."""
        return self.command("cancel", job=job)

    def jobs(self) -> list[dict[str, Any]]:
        """All jobs, newest first."""
        return list(self.command("jobs")["jobs"])

    def job(self, job: str) -> dict[str, Any]:
        """One job with its deals, by any unambiguous beginning of its id."""
        return self.command("job", job=job)

    def matches(self, job: str) -> dict[str, Any]:
        """How each deal of a job was matched, in hex; market.audit makes it again."""
        return self.command("matches", job=job)

    def bundle(self, job: str) -> dict[str, Any]:
        """All signed evidence of a job, bytes in hex; protocol.bundle checks it."""
        return self.command("bundle", job=job)

    def book(self, where: str = "", *, sort: str = "", limit: int = 0) -> dict[str, Any]:
        """The asks heard, picked by a filter (market/filters.py); without one the offers too."""
        return self.command("book", where=where, sort=sort, limit=limit)

    def offers(self, where: str = "", *, sort: str = "", limit: int = 0) -> dict[str, Any]:
        """The offers heard, each with its bids and why this peer does not bid on it."""
        return self.command("offers", where=where, sort=sort, limit=limit)

    def trades(self, where: str = "", *, sort: str = "", limit: int = 0) -> dict[str, Any]:
        """The trades of the settlement log, newest first, and the statistics of those picked."""
        return self.command("trades", where=where, sort=sort, limit=limit)

    def quote(self, *, operations: int, unit_price_max: int | None = None, **needs: int | str) -> dict[str, Any]:
        """Price and speed of a job of `operations`, and price against waiting, from the asks heard.

        needs: memory_bytes, sandbox, device, device_memory_bytes, and for the cost of its checks segments and
        operations_per_segment.
        """
        return self.command("quote", operations=operations, unit_price_max=unit_price_max, **needs)

    def price(self, *, sell: bool = False, **given: int) -> dict[str, Any]:
        """A price limit, or with sell an ask. given: memory_bytes, sandbox, watts, kwh_micro (of a kilowatt-hour)."""
        return self.command("price", sell=sell, **given)

    def why(self, of: str = "") -> dict[str, Any]:
        """Why a job stands still, why this peer ("me") earns nothing, or all that is wrong here."""
        return self.command("why", of=of)

    def bench(self, *, peer: str = "", memory_bytes: int | None = None) -> dict[str, Any]:
        """Have a connected peer challenge this one, and make the card; `events` tells how it goes."""
        return self.command("bench", peer=peer, memory_bytes=memory_bytes)

    def challenge(self, peers: list[str]) -> list[str]:
        """Invite peers to be challenged by this one, all connected solvers if none is named; those invited."""
        return list(self.command("challenge", peers=peers)["invited"])

    def cards(self) -> dict[str, Any]:
        """The bench cards this peer knows, and its own."""
        return self.command("cards")

    def disputes(self) -> list[dict[str, Any]]:
        """All disputes the peer hears, plays in or looks on at, newest first."""
        return list(self.command("disputes")["disputes"])

    def dispute(self, dispute: str) -> dict[str, Any]:
        """One dispute with its descent, by any unambiguous beginning of its id. Raises NotFound's error."""
        return self.command("dispute", dispute=dispute)

    def drops(self) -> dict[str, Any]:
        """What was dropped since the daemon's start: `total`, `reasons`, and `rows` by reason and author."""
        return self.command("drops")

    def reputation(self, peer: str = "", *, role: str = "") -> dict[str, Any]:
        """What the settlement log says of a peer, or of all, with its reasons."""
        return self.command("reputation", peer=peer, role=role)

    def reputation_bundle(self, peer: str = "") -> dict[str, Any]:
        """The co-signed evidence of a peer, bytes in hex; peer.reputation_bundle checks it."""
        return self.command("reputation-bundle", peer=peer)

    def dispute_bundle(self, dispute: str) -> dict[str, Any]:
        """All signed evidence of one dispute, bytes in hex; peer.dispute_bundle checks it. `program` is a blob's id."""
        return self.command("dispute-bundle", dispute=dispute)

    def wallet(self, *, everybody: bool = False) -> dict[str, Any]:
        """This peer's buckets, or everybody's."""
        return self.command("wallet", all=everybody)

    def stake(self, amount_micro: int) -> dict[str, Any]:
        """Move free credits into the stake; the move, and whether it is done."""
        return self.command("stake", amount_micro=amount_micro)

    def unstake(self, amount_micro: int) -> dict[str, Any]:
        """Begin to take credits out of the stake: `window_s` later they are free."""
        return self.command("unstake", amount_micro=amount_micro)

    def credit(self) -> dict[str, Any]:
        """The credit lines given and had, and what is owed, a row for each other peer."""
        return self.command("credit")

    def credit_give(self, peer: str, *, limit_micro: int, days: int) -> dict[str, Any]:
        """Let a peer run up debts with this one, up to a limit."""
        return self.command("credit-give", peer=peer, limit_micro=limit_micro, days=days)

    def credit_revoke(self, peer: str) -> dict[str, Any]:
        """Close the line to a peer for new work."""
        return self.command("credit-revoke", peer=peer)

    def credit_net(self, peer: str = "") -> dict[str, Any]:
        """Net debts with a peer; without one with all, and look for cycles of debts."""
        return self.command("credit-net", peer=peer)

    def pause(self, *, within_ms: int) -> dict[str, Any]:
        """Stop working and free the memory of workers; answers when it is free and their state on the disk."""
        body = json.dumps({"within_ms": within_ms}).encode("ascii")
        # A large state takes its time to the disk after the memory is free.
        return self._answer("POST", "/v1/command/pause", iter((body,)), len(body), patience=_PAUSE_SECONDS)

    def earnings(self, *, since_ns: int = 0) -> list[dict[str, Any]]:
        """What the peer was paid, oldest first."""
        return list(self.command("earnings", since_ns=since_ns)["earnings"])

    def house(self, *, on: bool | None = None) -> dict[str, Any]:
        """What the house pays this peer and why not; `on` opts in or out first."""
        return self.command("house") if on is None else self.command("house-want", on=on)

    def finish(self, *, on: bool = True) -> dict[str, Any]:
        """Take no new work and finish what there is; or, with `on` false, take new work again."""
        return self.command("finish", on=on)

    def resume(self) -> dict[str, Any]:
        """Go on after a pause."""
        return self.command("resume")

    # --- the daemon ----------------------------------------------------------------------------------------
    def connect(self, address_or_invite: str) -> dict[str, Any]:
        """Dial another peer."""
        return self._json("POST", "/v1/connect", {"address": address_or_invite})

    def invite(self) -> str:
        """What another peer's `--peer` takes."""
        return str(self._json("GET", "/v1/invite")["invite"])

    def doctor(self) -> list[dict[str, Any]]:
        """The checks of the running daemon."""
        return list(self._json("GET", "/v1/doctor")["lines"])

    def stop(self) -> None:
        """Ask the daemon to end."""
        self._json("POST", "/v1/stop")

    # --- blobs ---------------------------------------------------------------------------------------------
    def put_blob(
        self,
        data: bytes | memoryview | Path,
        progress: Progress = lambda moved, total: None,
        *,
        sealed: bool = False,
    ) -> bytes:
        """Store bytes or a file; returns the 32-byte blob id. Raises as `command`, and OSError for the file.

        sealed: it is for a sealed job: no peer gets it before one names it, and then only with its key.
        """
        total = data.stat().st_size if isinstance(data, Path) else len(data)
        pieces = _pieces(data, total, progress)
        answer = self._answer(
            "PUT", "/v1/blobs" + ("?sealed=1" if sealed else ""), pieces, total, patience=_UPLOAD_SECONDS
        )
        assert answer["size"] == total, answer
        return bytes.fromhex(answer["blob"])

    def get_blob(self, blob: bytes, to: Path, progress: Progress = lambda moved, total: None) -> None:
        """Write a blob to the file `to`, whole or not at all. Raises NotFound's code, OSError for the file."""
        part = to.with_name(to.name + ".part")
        try:
            with self._call("GET", f"/v1/blobs/{blob.hex()}") as response, part.open("wb") as file:
                total, moved = int(response.headers["content-length"]), 0
                while moved < total:
                    with _cut():
                        piece = response.read(min(params.CONTROL_CHUNK_BYTES, total - moved))
                    if not piece:
                        raise ConnectionLost(f"the daemon gave {moved} of {total} bytes")
                    file.write(piece)
                    moved += len(piece)
                    progress(moved, total)
            part.replace(to)
        finally:
            part.unlink(missing_ok=True)

    # --- events --------------------------------------------------------------------------------------------
    def events(self, job: str | None = None, *, follow: bool = False, since: int = 0) -> Iterator[dict[str, Any]]:
        """Events with a `seq` above `since`, of one job or of none, oldest first; follow: and then as they come.

        A cut connection is taken up again after the last event seen. Raises DaemonNotRunning once the daemon is gone.
        """
        query = {"since": str(since), "follow": "1" if follow else "0"} | ({"job": job} if job else {})
        fruitless = 0
        while True:
            fruitless += 1
            try:
                with self._call("GET", f"/v1/events?{urlencode(query)}", patience=None) as response:
                    while True:
                        with _cut():
                            line = response.readline()
                        if not line.endswith(b"\n"):
                            break
                        event = json.loads(line)
                        fruitless, query["since"] = 0, str(event["seq"])
                        yield event
                if line:
                    raise ConnectionLost("the daemon stopped in the middle of a line")
            except ConnectionLost:
                if not follow or fruitless >= _FRUITLESS_MAX:
                    raise
            else:
                if not follow:
                    return

    # --- http ----------------------------------------------------------------------------------------------
    def _json(self, method: str, path: str, arguments: dict[str, Any] | None = None) -> dict[str, Any]:
        body = b"" if arguments is None else json.dumps(arguments).encode("ascii")
        return self._answer(method, path, iter((body,)), len(body))

    def _answer(
        self, method: str, path: str, body: Iterator[bytes], size: int, *, patience: float = _CALL_SECONDS
    ) -> dict[str, Any]:
        """Send a body and return the answer, a JSON object. patience: seconds to wait for it."""
        with self._call(method, path, body, size, patience=patience) as response, _cut():
            return dict(json.loads(response.read()))

    @contextmanager
    def _call(
        self,
        method: str,
        path: str,
        body: Iterator[bytes] | None = None,
        size: int = 0,
        *,
        patience: float | None = _CALL_SECONDS,
    ) -> Iterator[HTTPResponse]:
        """A response, its error raised as ours. A connection serves one call: on this machine they cost nothing."""
        with self._open() as wire:
            connection = _Connection(wire)
            with _cut():
                connection.putrequest(method, path)
                connection.putheader("content-length", str(size))
                connection.endheaders()
            for piece in body or ():
                try:
                    wire.sendall(piece)
                except (BrokenPipeError, ConnectionResetError):
                    break  # it was refused before we were done; the answer says why
                except OSError as error:
                    raise _lost(error) from None
            wire.settimeout(patience)
            with _cut():
                response = connection.getresponse()
                if response.status >= 400:
                    raise _refusal(response.status, response.read())
            yield response

    @contextmanager
    def _open(self) -> Iterator[socket.socket]:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as wire:
            wire.settimeout(_CALL_SECONDS)
            try:
                with socket_name(self.data_dir / "control.sock") as name:
                    wire.connect(name)
            except PermissionError:
                raise IchibaError(
                    f"the daemon of {self.data_dir} is not yours", next_step="ask its owner, or name your own --data"
                ) from None
            except OSError:
                raise DaemonNotRunning(
                    f"no daemon serves {self.data_dir}",
                    why="it is not started, or uses another data directory",
                    next_step="ichiba up",
                ) from None
            yield wire


class _Connection(HTTPConnection):
    """HTTP on a socket that is connected already."""

    def __init__(self, wire: socket.socket) -> None:
        super().__init__("ichiba")
        self.sock = wire


@contextmanager
def _cut() -> Iterator[None]:
    """What the socket or HTTP raises inside, as ConnectionLost."""
    try:
        yield
    except (HTTPException, OSError) as error:
        raise _lost(error) from None


def _lost(error: Exception) -> ConnectionLost:
    if isinstance(error, TimeoutError):
        return ConnectionLost("the daemon did not answer in time", next_step="see what `ichiba doctor` says")
    return ConnectionLost(
        "the connection to the daemon was cut", why=str(error)[:200], next_step="is it running? `ichiba status`"
    )


def _refusal(status: int, body: bytes) -> IchibaError:
    try:
        return CommandRefused(json.loads(body)["error"])
    except (ValueError, KeyError, TypeError):
        return ConnectionLost(f"the daemon answered {status} without a reason")


def _pieces(data: bytes | memoryview | Path, total: int, progress: Progress) -> Iterator[bytes]:
    """`data` in pieces of one control chunk; exactly `total` bytes, or OSError if the file changed meanwhile."""
    moved = 0
    with ExitStack() as stack:
        file = stack.enter_context(data.open("rb")) if isinstance(data, Path) else None
        while moved < total:
            count = min(params.CONTROL_CHUNK_BYTES, total - moved)
            piece = file.read(count) if file is not None else bytes(memoryview(data)[moved : moved + count])  # type: ignore[arg-type]
            if not piece:
                raise OSError("the file became shorter while it was read")
            yield piece
            moved += len(piece)
            progress(moved, total)
