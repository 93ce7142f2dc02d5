"""The control socket: what the owner may ask, and that bytes of whatever kind do nothing else."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from peer.client import Client, CommandRefused, ConnectionLost, DaemonNotRunning
from peer.control import decode_command, serve_control
from peer.control_http import BadRequest
from peer.control_verbs import VERBS
from protocol import params
from tests.fake_daemon import JOB, FakeDaemon, running, talk

SUBMIT = {
    "task": "00ff",
    "budget_micro": 5,
    "unit_price_max": 2000,
    "base_root": "11" * 32,
    "checkpoint_bytes": 100,
    "memory_bytes": 1 << 30,
}


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[FakeDaemon]:
    with running(tmp_path) as fake:
        yield fake


@pytest.fixture
def client(daemon: FakeDaemon, tmp_path: Path) -> Iterator[Client]:
    with Client(tmp_path) as made:
        yield made


# --- the socket --------------------------------------------------------------------------------------------
def test_only_the_owner_can_open_the_socket(daemon: FakeDaemon, tmp_path: Path) -> None:
    assert stat.S_IMODE(os.stat(tmp_path / "control.sock").st_mode) == 0o600


def test_a_daemon_that_ends_takes_its_socket_with_it_and_one_that_crashed_is_replaced(tmp_path: Path) -> None:
    with running(tmp_path):
        assert (tmp_path / "control.sock").exists()
    assert not (tmp_path / "control.sock").exists()
    with pytest.raises(DaemonNotRunning) as told, Client(tmp_path) as client:
        client.status()
    assert told.value.exit_code == 3
    assert told.value.next_step == "ichiba up"
    import socket

    dead = socket.socket(socket.AF_UNIX)
    dead.bind(str(tmp_path / "control.sock"))
    dead.close()
    with running(tmp_path), Client(tmp_path) as client:
        assert client.status() == {"verb": "status"}


def test_a_data_directory_with_a_long_name_works(tmp_path: Path) -> None:
    long = tmp_path / ("d" * 120)
    long.mkdir()
    with running(long), Client(long) as client:
        assert client.invite() == "ichiba1qqq"


# --- calls -------------------------------------------------------------------------------------------------
def test_every_call_of_the_client_reaches_the_daemon_with_its_arguments(daemon: FakeDaemon, client: Client) -> None:
    daemon.answers["jobs"] = lambda _: {"jobs": [{"job": JOB}]}
    daemon.lines = [{"what": "peers"}]
    assert client.job("abab") == {"job": JOB, "raw": "ff00"}
    assert client.jobs() == [{"job": JOB}]
    assert client.quote(operations=10**9)["verb"] == "quote"
    assert client.wallet(everybody=True)["verb"] == "wallet"
    assert client.connect("/ip4/1.2.3.4/tcp/1") == {"connected": "/ip4/1.2.3.4/tcp/1"}
    assert client.doctor() == [{"what": "peers"}]
    assert daemon.seen[-2:] == [
        (
            "quote",
            {
                "operations": 10**9,
                "unit_price_max": None,
                "memory_bytes": 0,
                "sandbox": 2,
                "device": "any",
                "device_memory_bytes": 0,
                "segments": 0,
                "operations_per_segment": 0,
            },
        ),
        ("wallet", {"all": True}),
    ]


def test_a_refusal_of_the_daemon_arrives_with_its_code_words_and_exit_code(client: Client) -> None:
    with pytest.raises(CommandRefused) as told:
        client.command("submit", **SUBMIT)
    assert (told.value.code, told.value.exit_code, told.value.why) == ("insufficient-funds", 8, "poor")
    with pytest.raises(CommandRefused) as told:
        client.job("ffff")
    assert (told.value.code, told.value.exit_code) == ("not-found", 4)
    assert client.status() == {"verb": "status"}


def test_stop_is_answered_before_the_daemon_ends(tmp_path: Path) -> None:
    with running(tmp_path), Client(tmp_path) as client:
        client.stop()


# --- blobs -------------------------------------------------------------------------------------------------
def test_a_blob_comes_back_as_it_went_in_and_progress_is_told(
    daemon: FakeDaemon, client: Client, tmp_path: Path
) -> None:
    data = os.urandom(3_000_000)
    moved: list[tuple[int, int]] = []
    blob = client.put_blob(data, lambda done, total: moved.append((done, total)))
    (tmp_path / "file").write_bytes(data)
    assert client.put_blob(tmp_path / "file") == blob
    client.get_blob(blob, tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == data
    assert moved[-1] == (3_000_000, 3_000_000)
    assert client.put_blob(b"") != blob
    assert list((tmp_path / "uploads").iterdir()) == []


def test_an_unknown_blob_is_not_found_and_leaves_no_file(client: Client, tmp_path: Path) -> None:
    with pytest.raises(CommandRefused) as told:
        client.get_blob(bytes(32), tmp_path / "back")
    assert told.value.exit_code == 4
    assert not list(tmp_path.glob("back*"))


def test_an_upload_above_the_limit_is_refused_and_forgotten(
    daemon: FakeDaemon, client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(params, "BLOB_BYTES_MAX", 1_000_000)
    with pytest.raises(CommandRefused) as told:
        client.put_blob(bytes(9_000_000))
    assert told.value.code == "limit-exceeded"
    assert list((tmp_path / "uploads").iterdir()) == []


def test_an_upload_cut_off_half_way_leaves_nothing(daemon: FakeDaemon, client: Client, tmp_path: Path) -> None:
    head = b"PUT /v1/blobs HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n"
    answer = talk(tmp_path / "control.sock", head + bytes(10))
    assert answer.startswith(b"HTTP/1.1 400")
    assert client.status() == {"verb": "status"}
    assert list((tmp_path / "uploads").iterdir()) == []


# --- hostile bytes -----------------------------------------------------------------------------------------
def post(body: bytes, verb: str = "submit", *extra: bytes) -> bytes:
    head = [f"POST /v1/command/{verb} HTTP/1.1".encode(), b"host: x", *extra]
    return b"\r\n".join([*head, b"content-length: %d" % len(body), b"", body])


HOSTILE = {
    "garbage": (b"\x00\xff garbage\r\n\r\n", "usage"),
    "nothing": (b"", "usage"),
    "half a head": (b"GET /v1/doctor HTTP/1.1\r\nhost", "usage"),
    "a head without end": (b"GET /v1/doctor HTTP/1.1\r\nx: " + b"a" * 100_000, "usage"),
    "http/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 50, "no-route"),
    "an upgrade": (post(b"{}", "status", b"upgrade: websocket", b"connection: upgrade") + b"\xff" * 99, None),
    "two lengths": (post(b"{}", "status", b"content-length: 7"), "usage"),
    "a bad chunk": (b"POST /v1/connect HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n", "usage"),
    "no route": (b"GET /etc/passwd HTTP/1.1\r\nhost: x\r\n\r\n", "no-route"),
    "a way up": (b"GET /v1/blobs/../../key HTTP/1.1\r\nhost: x\r\n\r\n", "no-route"),
    "another method": (b"DELETE /v1/blobs HTTP/1.1\r\nhost: x\r\n\r\n", "method"),
    "no such verb": (post(b"{}", "format-disk"), "no-route"),
    "no json": (post(b"\xff\xfe"), "usage"),
    "a list": (post(b"[]"), "usage"),
    "deep json": (post(b'{"task":' + b"[" * 100_000), "usage"),
    "deep json of an unknown field": (post(b'{"x":' + b'{"a":' * 100_000, "status"), "usage"),
    "an unknown field": (post(b'{"x":1}', "status"), "usage"),
    "a wrong type": (post(json.dumps(SUBMIT | {"budget_micro": "5"}).encode()), "usage"),
    "a huge number": (post(json.dumps(SUBMIT | {"budget_micro": 10**30}).encode()), "usage"),
    "a negative number": (post(json.dumps(SUBMIT | {"unit_price_max": -1}).encode()), "usage"),
    "a lone surrogate": (post(b'{"job":"\\ud800"}', "job"), "usage"),
    "a huge body": (post(b" " * (params.CONTROL_BODY_BYTES_MAX + 1)), "limit-exceeded"),
    "a query of junk": (b"GET /v1/events?a=1&%zz HTTP/1.1\r\nhost: x\r\n\r\n", "usage"),
    "a long query": (
        b"GET /v1/events?" + b"&".join(b"%d=1" % n for n in range(99)) + b" HTTP/1.1\r\nhost: x\r\n\r\n",
        "usage",
    ),
    "a since of junk": (b"GET /v1/events?since=-1 HTTP/1.1\r\nhost: x\r\n\r\n", "usage"),
    "a job of junk": (b"GET /v1/events?job=.. HTTP/1.1\r\nhost: x\r\n\r\n", "usage"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_bytes_get_a_typed_refusal_and_the_daemon_goes_on(
    daemon: FakeDaemon, client: Client, tmp_path: Path, name: str
) -> None:
    data, code = HOSTILE[name]
    answer = talk(tmp_path / "control.sock", data)
    if code is not None and data:
        error = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
        assert error["code"] == code
        assert set(error) == {"code", "what", "why", "next", "exit_code"}
        assert error["what"]
    assert daemon.seen == [] or name == "an upgrade"
    assert client.status() == {"verb": "status"}


@settings(max_examples=150, deadline=None)
@given(verb=st.sampled_from(sorted(VERBS)) | st.text(max_size=20), body=st.binary(max_size=60))
def test_any_bytes_decode_to_checked_arguments_or_are_refused(verb: str, body: bytes) -> None:
    try:
        arguments = decode_command(verb, body)
    except BadRequest as error:
        assert error.what
        return
    assert set(arguments) == set(VERBS[verb].__struct_fields__)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["00", "ab" * 32]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=300, deadline=None)
@given(change=st.dictionaries(st.sampled_from([*SUBMIT, "sandbox", "x"]), JSON, max_size=3), drop=st.booleans())
def test_what_the_decoder_lets_through_is_in_range(change: dict[str, Any], drop: bool) -> None:
    """Whatever JSON a caller sends, the node sees the right types and bounded numbers only."""
    given_fields = SUBMIT | change
    if drop:
        given_fields.pop("task")
    try:
        arguments = decode_command("submit", json.dumps(given_fields).encode())
    except BadRequest:
        return
    assert not drop
    assert "x" not in change
    assert 1 <= arguments["budget_micro"] <= params.AMOUNT_MICRO_MAX
    assert len(bytes.fromhex(arguments["base_root"])) == 32
    bytes.fromhex(arguments["task"])
    assert all(type(arguments[name]) is int for name in ("unit_price_max", "checkpoint_bytes", "memory_bytes"))
    assert 0 <= arguments["sandbox"] <= 4
    msgspec.msgpack.encode(arguments)  # every number fits the journal


def test_a_request_is_read_whole_however_it_is_cut(daemon: FakeDaemon, tmp_path: Path) -> None:
    whole = post(b'{"operations": 7}', "quote")
    pieces = b""
    for at in (1, 10, len(whole) - 3):
        answer = talk(tmp_path / "control.sock", whole[:at] + whole[at:])
        pieces += answer
    assert pieces.count(b"HTTP/1.1 200") == 3
    both = talk(tmp_path / "control.sock", whole + whole)
    assert both.count(b"HTTP/1.1 200") == 2  # pipelined


async def test_silence_is_cut_off_and_costs_nothing_meanwhile(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    daemon = FakeDaemon(tmp_path)
    path = tmp_path / "control.sock"
    async with trio.open_nursery() as nursery:
        await nursery.start(serve_control, daemon, path)
        wire = await trio.open_unix_socket(str(path))
        await wire.send_all(b"GET /v1/doctor HTT")
        begun = trio.current_time()
        assert await wire.receive_some() == b""
        assert trio.current_time() - begun == pytest.approx(params.CONTROL_HEADER_SECONDS_MAX, abs=0.1)
        idle = await trio.open_unix_socket(str(path))
        statistics = trio.lowlevel.current_statistics()
        # Nothing is scheduled but the cut-off of the idle connection: no polling.
        assert statistics.seconds_to_next_deadline > 1
        await idle.aclose()
        nursery.cancel_scope.cancel()


async def test_more_connections_than_allowed_are_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(params, "CONTROL_CONNECTIONS_MAX", 2)
    daemon = FakeDaemon(tmp_path)
    async with trio.open_nursery() as nursery:
        await nursery.start(serve_control, daemon, tmp_path / "control.sock")
        held = [await trio.open_unix_socket(str(tmp_path / "control.sock")) for _ in range(2)]
        for wire in held:
            await wire.send_all(post(b"{}", "status"))
            assert (await wire.receive_some()).startswith(b"HTTP/1.1 200")
        third = await trio.open_unix_socket(str(tmp_path / "control.sock"))
        await third.send_all(post(b"{}", "status"))
        answer = b""
        while part := await third.receive_some():
            answer += part
        assert b'"busy"' in answer
        nursery.cancel_scope.cancel()


# --- events ------------------------------------------------------------------------------------------------
def test_past_events_are_given_from_any_point_on(daemon: FakeDaemon, client: Client) -> None:
    for seq in range(1, 6):
        daemon.tell(seq, step=seq)
    daemon.tell(9, job=None)
    assert [event["seq"] for event in client.events("abab")] == [1, 2, 3, 4, 5]
    assert [event["seq"] for event in client.events(JOB, since=3)] == [4, 5]
    assert [event["seq"] for event in client.events()] == [9]
    with pytest.raises(CommandRefused) as told:
        list(client.events("cd"))
    assert told.value.exit_code == 4


def test_a_follower_gets_past_and_live_events_once_each_and_in_order(daemon: FakeDaemon, client: Client) -> None:
    for seq in range(1, 4):
        daemon.tell(seq)
    # While the history is read the job goes on: told to the listener, and in the history or not yet.
    told = []

    def meanwhile() -> None:
        if not told:
            told.append(1)
            daemon.soon(daemon.tell, 4)
            daemon.soon(lambda: daemon.tell(5, late=True))
            daemon.soon(daemon.tell, 6, "done")

    daemon.on_history = meanwhile
    seen = []
    for event in client.events(JOB, follow=True):
        seen.append(event["seq"])
        if event["kind"] == "done":
            break
    assert seen == [1, 2, 3, 4, 5, 6]


def test_an_event_told_before_its_row_is_on_the_disk_is_not_lost(daemon: FakeDaemon, client: Client) -> None:
    daemon.tell(1)
    daemon.tell(2, "done", late=True)  # told when nobody listened; its row comes with the next commit
    seen = []
    for event in client.events(JOB, follow=True):
        seen.append(event["seq"])
        if event["kind"] == "done":
            break
    assert seen == [1, 2]


async def test_a_follower_that_does_not_read_loses_nothing(tmp_path: Path) -> None:
    daemon = FakeDaemon(tmp_path, listener_events_max=8)
    path = tmp_path / "control.sock"
    async with trio.open_nursery() as nursery:
        await nursery.start(serve_control, daemon, path)
        wire = await trio.open_unix_socket(str(path))
        await wire.send_all(b"GET /v1/events?follow=1&job=%s HTTP/1.1\r\nhost: x\r\n\r\n" % JOB.encode())
        while not daemon.listeners:
            await trio.lowlevel.checkpoint()
        count = 3000
        for seq in range(1, count + 1):
            daemon.tell(seq, pad="x" * 500)  # 1.5 MB: far more than the socket and the channel hold
            if seq % 50 == 0:
                await trio.testing.wait_all_tasks_blocked()
        seen: list[int] = []
        buffer = b""
        while len(seen) < count:
            buffer += await wire.receive_some()
            *whole, buffer = buffer.split(b"\n")
            seen += [json.loads(line)["seq"] for line in whole if line.startswith(b"{")]
        assert seen == list(range(1, count + 1))
        nursery.cancel_scope.cancel()


def test_a_follower_that_leaves_is_let_go(daemon: FakeDaemon, client: Client) -> None:
    daemon.tell(1)
    following = client.events(JOB, follow=True)
    assert next(following)["seq"] == 1
    assert len(daemon.listeners) == 1
    following.close()
    for _ in range(2000):
        client.status()
        if not daemon.listeners:
            break
    assert daemon.listeners == []


def test_a_follower_takes_up_a_cut_connection_where_it_was(tmp_path: Path) -> None:
    with Client(tmp_path) as client:
        with running(tmp_path, lambda daemon: daemon.tell(1)):
            following = client.events(JOB, follow=True)
            assert next(following)["seq"] == 1

        def later(daemon: FakeDaemon) -> None:
            daemon.tell(1)
            daemon.tell(2)

        with running(tmp_path, later):
            assert next(following)["seq"] == 2
        with pytest.raises((DaemonNotRunning, ConnectionLost)):
            next(following)
