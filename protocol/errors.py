"""Every error Ichiba raises on purpose, split by who erred.

Each error says what happened, why, and the command or action that mends it, because users of compute
markets complain first of errors that name the wrong cause. Verification raises one of these; it never
returns a bool.
"""

from __future__ import annotations

__all__ = [
    "CorruptStore",
    "IchibaError",
    "InsufficientFunds",
    "LimitExceeded",
    "LocalProtocolError",
    "MalformedRecord",
    "NotFound",
    "RemoteProtocolError",
    "UnsupportedModel",
    "VerificationFailed",
    "WrongNetwork",
    "harmless",
]


class IchibaError(Exception):
    """Base of all deliberate errors.

    what: one sentence with values. why: the cause, if it is not plain from `what`. next_step: a command or
    action that mends it. `code` is stable and machine-readable; `exit_code` is the CLI's (docs/cli.md).
    """

    code = "error"
    exit_code = 1

    def __init__(self, what: str, *, why: str = "", next_step: str = "") -> None:
        self.what, self.why, self.next_step = what, why, next_step
        super().__init__("; ".join(part for part in (what, why, next_step) if part))

    def as_dict(self) -> dict[str, str]:
        """The error as the control API and `--json` print it."""
        return {"code": self.code, "what": self.what, "why": self.why, "next": self.next_step}


class LocalProtocolError(IchibaError):
    """We erred: a call or an event that the state does not allow."""

    code = "local-protocol"


class RemoteProtocolError(IchibaError):
    """The other peer erred: refuse the bytes and penalise the sender."""

    code = "remote-protocol"


class MalformedRecord(RemoteProtocolError):
    """Bytes that are no record: not canonical, out of bounds, of an unknown kind or version."""

    code = "malformed"


class WrongNetwork(RemoteProtocolError):
    """A valid record of another network."""

    code = "wrong-network"


class VerificationFailed(RemoteProtocolError):
    """A signature, hash, root or amount that does not match what it claims."""

    code = "verification-failed"


class LimitExceeded(RemoteProtocolError):
    """More, longer or faster than protocol/params.py allows."""

    code = "limit-exceeded"


class UnsupportedModel(IchibaError):
    """A model the capture cannot turn into a Program; names the operation and the user's line."""

    code = "unsupported-model"


class InsufficientFunds(IchibaError):
    """An account holds less than the entry takes."""

    code = "insufficient-funds"
    exit_code = 8


class NotFound(IchibaError):
    """No such job, peer, blob or record."""

    code = "not-found"
    exit_code = 4


class CorruptStore(IchibaError):
    """The journalled store does not read back as it was written."""

    code = "corrupt-store"


def harmless(text: str) -> str:
    """A stranger's words for a person's terminal: what is no printable sign becomes U+FFFD, so no escape sequence
    moves the cursor, renames the window or answers in the person's place."""
    return "".join(c if c in "\n\t" or c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
