"""Attacks over the network and over sockets on this machine, beside those of the canary."""

from __future__ import annotations

import os
import socket

from .calls import Decoys, Refused, any_of


def listen_tcp(_: Decoys) -> str:
    with socket.socket() as server:
        server.bind(("0.0.0.0", 0))
        server.listen()
        return "a port of its own"


def odd_sockets(_: Decoys) -> str:
    """Families with much kernel code and many past holes: netlink, packet, vsock, the kernel's ciphers, TIPC."""

    def opened(family: int, kind: int) -> str:
        socket.socket(family, kind).close()
        return f"family {family}"

    return any_of(*(lambda f=f, k=k: opened(f, k) for f, k in ((16, 3), (17, 3), (40, 1), (38, 5), (30, 2))))


def pass_descriptor(decoys: Decoys) -> str:
    """Hand the daemon a descriptor it did not ask for, over whatever it still holds of a socket."""
    import array
    import stat

    for number in range(256):
        try:
            is_socket = stat.S_ISSOCK(os.fstat(number).st_mode)
        except OSError:
            continue
        if is_socket:
            with socket.socket(fileno=number) as channel:
                channel.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [1]).tobytes())])
            return f"sent a descriptor through {number}"
    left, right = socket.socketpair()
    with left, right:
        raise Refused("no socket takes it")
