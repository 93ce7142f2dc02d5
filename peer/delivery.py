"""Data that a player says it cannot get goes through the notaries: nobody's word that it could not fetch decides.

Only of a base that a receipt of the solver names can the solver be guilty of withholding; the first base of a deal is
its submitter's.
"""

from __future__ import annotations

from peer.desk import Desk
from peer.events import Fetch, Fetched
from peer.hearing import Hearing
from peer.messages import BaseGiven
from protocol import params

__all__ = ["ask_base", "base_fetched"]


def ask_base(desk: Desk, hearing: Hearing, peer: bytes) -> None:
    """A player cannot get the base: fetch it from whoever has it, the other player first, and pass it on."""
    file = hearing.file
    segment, agreement = file.challenge.segment, file.case.agreement
    if segment == agreement.first_segment:
        return
    hearing.base_for.add(peer)
    if hearing.base_here:
        desk.send(peer, BaseGiven(file.id))
    elif desk.now_ns >= hearing.base_asked_ns + params.RESEND_NS:
        hearing.base_asked_ns = desk.now_ns
        others = sorted(desk.network.notary_keys - {desk.me})
        sources = (agreement.solver, agreement.submitter, file.challenge.challenger, *others)
        root = file.case.receipt(segment).in_root
        desk.add(
            Fetch(file.case.base(segment), file.id, sources, params.BLOB_BYTES_MAX, root, program=file.task.program)
        )


def base_fetched(desk: Desk, hearing: Hearing, event: Fetched) -> None:
    """The base is here, or nobody gives it: then the player asks again, until the clock decides."""
    if event.error:
        return
    hearing.base_here = True
    if hearing.opened_ns and not hearing.number:
        hearing.opened_ns = desk.now_ns  # the player gets its time from now
    for peer in sorted(hearing.base_for):
        desk.send(peer, BaseGiven(hearing.file.id))
