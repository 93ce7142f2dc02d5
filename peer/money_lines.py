"""The money lines of this peer's deals and jobs (protocol/money_line.py), from its deals and their channels."""

from __future__ import annotations

from collections.abc import Iterable

from peer.channel import Channel
from peer.deals import Deal
from protocol.lifecycle import State
from protocol.money_line import MoneyLine
from protocol.network import Network

__all__ = ["line_of", "line_over"]


def line_of(deal: Deal, channel: Channel | None, network: Network) -> MoneyLine:
    """The line of one deal. A slashed one is settled with nothing, and what was earned in it is accepted by nobody."""
    accepted = deal.lifecycle in (State.SETTLING, State.SETTLED)
    if deal.lifecycle == State.CLAIMED and deal.drawn:
        right = {segment for check in deal.checks if check.state == "right" for segment in check.segments}
        accepted = right.issuperset(deal.drawn)
    earned = deal.cumulative_micro
    if channel is None or not channel.closed:
        return MoneyLine(earned, earned if accepted else 0)
    kept = channel.paid_micro - channel.pool_micro(channel.paid_micro, network)
    return MoneyLine(earned, earned if accepted else 0, channel.paid_micro, kept)


def line_over(deals: Iterable[Deal], channels: dict[bytes, Channel], network: Network) -> MoneyLine:
    """The sum of the lines of some deals."""
    return sum((line_of(deal, channels.get(deal.id), network) for deal in deals), MoneyLine())
