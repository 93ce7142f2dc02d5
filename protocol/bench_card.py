"""The bench card: a chain of exact matrix products that anybody checks in a small part of the time it took. DESIGN §9.

The chain of a challenge has LANES lanes; each is X_0 = B, X_(i+1) = X_i * B[order_i] modulo 251, where B is a matrix
and each order_i a permutation of its rows, all drawn from the challenge's id and so bound to one peer, one challenger
and one moment. The results X_links are the whole evidence: one byte an element. Freivalds' method checks every link
at once: for a row v that the checker alone knows, v * X_links must equal ((v * B) * B[order_0]) * ..., which is one
pass over B for each link where the maker needed products of matrices. A result that is wrong in any element passes
one row with probability 1/251, and VECTORS of them with 2.5e-10. The checker draws v itself after it has the result,
so there is nothing to grind, and every peer convinces itself. A check is bound by reading B, so the lanes, which
share B and not their orders, halve it.

The memory of a challenge is a line of blocks, each made of the one before and of one that the content of that one
points at (as scrypt and Argon2d do), so that a block that was not kept costs the recomputing of many. A Merkle root
commits to them; the challenger then asks for random ones. This module knows no clock, network or torch.

Source: R. Freivalds, "Probabilistic machines can use less running time" (IFIP 1977); Percival, RFC 7914, §5;
RFC 9106, §3.4.1.1.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import Annotated, Final, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from protocol import params
from protocol.blob import blob_id, manifest_of
from protocol.codec import Digest, Uint, blake, decode, encode
from protocol.errors import LimitExceeded, MalformedRecord, VerificationFailed
from protocol.merkle import verify_path
from protocol.philox import words
from protocol.records import BenchCard, BenchChallenge, open_record

__all__ = [
    "INNER_MAX",
    "LANES",
    "LARGEST",
    "PRIME",
    "VECTORS",
    "CardFile",
    "Figures",
    "OpenCard",
    "Opening",
    "balanced",
    "base_matrix",
    "card_file",
    "chain_operations",
    "chain_size",
    "check_card_file",
    "check_opening",
    "check_work",
    "evidence_bytes",
    "evidence_id",
    "first_block",
    "next_block",
    "open_card",
    "open_challenge",
    "open_unwitnessed",
    "partner_of",
    "read_card_file",
    "reference_result",
    "row_orders",
    "work_seed",
]

PRIME: Final = 251  # the largest below 256: an element is one signed byte
LARGEST: Final = PRIME // 2  # elements lie in [-125, 125]
INNER_MAX: Final = 1024  # sums of so many products stay below 2**24: exact in float32, in any order, fused or not
LANES: Final = 2  # more would lengthen the evidence
VECTORS: Final = 4  # of one check: a wrong result passes with probability 251**-4 = 2.5e-10
_BASE, _ORDER = 0, 1  # streams of the generator
_ORDERS_DRAWN: Final = 16
_BLOCK: Final = params.BENCH_MEMORY_BLOCK_BYTES
Bytes = Annotated[bytes, msgspec.Meta(min_length=_BLOCK, max_length=_BLOCK)]
Path = Annotated[tuple[Digest, ...], msgspec.Meta(max_length=params.BENCH_MEMORY_BLOCKS_MAX.bit_length())]


class Figures(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a peer measured of itself: per second and bytes, integers. Its word only."""

    float32_per_second: Uint
    memory_bytes: Uint
    memory_bytes_per_second: Uint
    disk_bytes: Uint
    disk_bytes_per_second: Uint
    cores: Annotated[int, msgspec.Meta(ge=1, le=2**20)]
    threads: Annotated[int, msgspec.Meta(ge=1, le=2**20)]
    device: Annotated[str, msgspec.Meta(max_length=96, pattern=r"^[ -~]*\Z")]


class Opening(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One probed block with the blocks it is made of, each with its path: (block, the one before, its partner)."""

    index: Uint
    blocks: Annotated[tuple[Bytes, ...], msgspec.Meta(min_length=1, max_length=3)]
    paths: Annotated[tuple[Path, ...], msgspec.Meta(min_length=1, max_length=3)]


class OpenCard(msgspec.Struct, frozen=True):
    """A card whose signatures and terms are right. grade: who timed it (`market.matching` weighs it)."""

    card: BenchCard
    id: bytes
    challenge: BenchChallenge
    challenge_id: bytes
    grade: Literal["witnessed", "self-timed"]

    @property
    def operations_per_second(self) -> int:
        """Exact integer operations a second: those of the chain by the time it took."""
        return chain_operations(self.challenge.side, self.challenge.links) * 10**9 // self.card.elapsed_ns

    @property
    def proven_memory_bytes(self) -> int:
        """The memory that was filled and probed; 0 for a self-timed card, whose probes nobody drew."""
        return self.challenge.memory_blocks * _BLOCK if self.grade == "witnessed" else 0


class CardFile(
    msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="ichiba/bench-card-file/1"
):
    """A card with its evidence, to be checked offline."""

    card: Annotated[bytes, msgspec.Meta(max_length=params.GOSSIP_RECORD_BYTES_MAX)]
    evidence: Annotated[bytes, msgspec.Meta(max_length=LANES * 4096 * 4096)]


# --- the chain ---------------------------------------------------------------------------------------------
def chain_operations(side: int, links: int) -> int:
    """The operations of a chain: 2 a multiply-add, as everywhere."""
    return LANES * 2 * side**3 * links


def evidence_bytes(side: int) -> int:
    """The length of a chain's results, lane after lane, each row-major."""
    return LANES * side * side


def chain_size(operations_per_second: int) -> tuple[int, int]:
    """(side, links) of a chain that takes about BENCH_TARGET_NS at this speed, as far as the limits allow.

    Larger sides are for faster devices: a check costs 2 / side of the making, times the speeds' quotient.
    """
    steps = ((512, 10**9), (1024, 10**10), (2048, 3 * 10**11))
    side = next((side for side, speed in steps if operations_per_second < speed), 4096)
    one = chain_operations(side, 1)
    links = operations_per_second * params.BENCH_TARGET_NS // (one * 10**9)
    return side, max(1, min(links, params.BENCH_LINKS_MAX, params.BENCH_OPERATIONS_MAX // one))


def _bound(challenge: BenchChallenge) -> None:
    """Refuse a chain whose check would take too long. Raises LimitExceeded."""
    operations = chain_operations(challenge.side, challenge.links)
    if operations > params.BENCH_OPERATIONS_MAX:
        raise LimitExceeded(f"a chain of {operations} operations, at most {params.BENCH_OPERATIONS_MAX} are checked")


def work_seed(challenge_id: bytes) -> int:
    """The generator's 64-bit seed of a challenge. Its id covers challenger, peer, nonce, sizes and time."""
    return int.from_bytes(blake("ichiba/bench-work", challenge_id)[:8], "little")


def base_matrix(seed: int, side: int) -> NDArray[np.int8]:
    """B: int8 (side, side), elements in [-125, 125]; random bytes, the five outermost values moved to the ends."""
    drawn = words(seed, 0, _BASE, side * side // 4).view(np.int8)
    return np.clip(drawn, -LARGEST, LARGEST, out=drawn).reshape(side, side)


def row_orders(seed: int, side: int, links: int) -> Iterator[NDArray[np.int64]]:
    """The order of B's rows in each link, for each lane: int64 (LANES, side), the stable order of random words.

    Drawn for _ORDERS_DRAWN links at a time, the number of the draw being the step: one by one, drawing would be a
    quarter of a check.
    """
    for draw in range(-(-links // _ORDERS_DRAWN)):
        drawn = words(seed, draw, _ORDER, _ORDERS_DRAWN * LANES * side).astype(np.uint64)
        keys = drawn.reshape(_ORDERS_DRAWN, LANES, side)
        # The place below the word: no two keys are equal, so every way of sorting gives the stable order.
        keys <<= np.uint64(16)
        keys |= np.arange(side, dtype=np.uint64)
        keys.sort(axis=-1)
        keys &= np.uint64(0xFFFF)
        yield from keys.view(np.int64)[: links - draw * _ORDERS_DRAWN]


def balanced(sums: NDArray[np.float32]) -> NDArray[np.float32]:
    """Integers of magnitude below 2**24 modulo 251, into [-125, 125]; float32, any shape, exact, in place.

    The quotient may be rounded to the wrong side near a half, by one; then the rest is 126, and is moved.
    """
    sums -= np.rint(sums * np.float32(1 / PRIME)) * np.float32(PRIME)
    sums[sums > LARGEST] -= PRIME
    sums[sums < -LARGEST] += PRIME
    return sums


def _times(vectors: NDArray[np.float32], matrix: NDArray[np.float32]) -> NDArray[np.float32]:
    """vectors (rows, side) by matrix (side, side) modulo 251, exact: INNER_MAX products at a time.

    Row vectors, because a slice of whole rows is read in one go: columns take a third longer.
    """
    total = np.zeros(vectors.shape, dtype=np.float32)
    for first in range(0, matrix.shape[0], INNER_MAX):
        total += balanced(vectors[:, first : first + INNER_MAX] @ matrix[first : first + INNER_MAX])
    return balanced(total)


def check_work(
    challenge: BenchChallenge, challenge_id: bytes, evidence: bytes, *, randbytes: Callable[[int], bytes]
) -> None:
    """Raise VerificationFailed unless `evidence` is the result of the challenge's chain; MalformedRecord if no matrix.

    randbytes: random bytes that the maker of the evidence could not know, as secrets.token_bytes. Costs
    O(links * side**2); a wrong element passes with probability 2.5e-10.
    """
    side = challenge.side
    _bound(challenge)
    if len(evidence) != evidence_bytes(side):
        raise MalformedRecord(f"evidence of {len(evidence)} bytes, results of side {side} have {evidence_bytes(side)}")
    result = np.frombuffer(evidence, dtype=np.int8).reshape(LANES, side, side)
    if int(result.max()) > LARGEST or int(result.min()) < -LARGEST:
        raise MalformedRecord("the evidence holds an element outside [-125, 125]", why="one residue has one byte")
    drawn = np.frombuffer(randbytes(8 * side * VECTORS), dtype="<u8") % PRIME  # uniform but for 2**-56
    vectors = (drawn.astype(np.float32) - LARGEST).reshape(VECTORS, side)
    seed = work_seed(challenge_id)
    base = base_matrix(seed, side).astype(np.float32)
    expected = np.tile(_times(vectors, base), (LANES, 1))
    moved = np.empty_like(expected)
    for orders in row_orders(seed, side, challenge.links):
        for lane, order in enumerate(orders):
            rows = slice(lane * VECTORS, (lane + 1) * VECTORS)
            moved[rows, order] = expected[rows]  # instead of moving the rows of B
        expected = _times(moved, base)
    if not np.array_equal(expected, np.concatenate([_times(vectors, lane.astype(np.float32)) for lane in result])):
        raise VerificationFailed(
            "the evidence is not the result of this challenge's chain",
            why="Freivalds' check failed: an element is wrong, or it was computed for another peer or challenge",
        )


def reference_result(challenge: BenchChallenge, challenge_id: bytes) -> bytes:
    """The chain in plain 64-bit integers: slow, and what every fast way must agree with."""
    seed = work_seed(challenge_id)
    base = base_matrix(seed, challenge.side).astype(np.int64)
    state = np.stack([base] * LANES)
    for orders in row_orders(seed, challenge.side, challenge.links):
        state = (state @ base[orders] + LARGEST) % PRIME - LARGEST
    return state.astype(np.int8).tobytes()


# --- memory ------------------------------------------------------------------------------------------------
def first_block(challenge_id: bytes) -> bytes:
    """Block 0."""
    return hashlib.shake_128(b"ichiba/bench-memory" + challenge_id).digest(_BLOCK)


def partner_of(before: bytes, index: int) -> int:
    """Which earlier block joins the one before in making block `index` (at least 2): its content decides."""
    return int.from_bytes(before[:8], "little") % (index - 1)


def next_block(challenge_id: bytes, index: int, before: bytes, partner: bytes) -> bytes:
    """Block `index` (at least 1): the sum of both, and a mask that only their whole sum gives.

    Block 1 has no partner: give zeros. Width matters: a block is not the hash of something short that could be kept
    in its stead.
    """
    whole = (np.frombuffer(before, np.uint64) ^ np.frombuffer(partner, np.uint64)).tobytes()
    key = hashlib.blake2b(whole, digest_size=32, key=challenge_id, person=b"ichiba/memory").digest()
    mask = hashlib.shake_128(key + index.to_bytes(8, "little")).digest(_BLOCK)
    return (np.frombuffer(whole, np.uint64) ^ np.frombuffer(mask, np.uint64)).tobytes()


def check_opening(opening: Opening, *, index: int, root: bytes, count: int, challenge_id: bytes) -> None:
    """Raise VerificationFailed unless the opened block lies under `root` and is made as it must be of two that do."""
    if opening.index != index or len(opening.blocks) != min(index + 1, 3) or len(opening.paths) != len(opening.blocks):
        raise VerificationFailed(f"the probe of block {index} is answered with other blocks")
    places = [index, index - 1][: len(opening.blocks)]
    if index >= 2:
        places.append(partner_of(opening.blocks[1], index))
    for block, place, path in zip(opening.blocks, places, opening.paths, strict=True):
        verify_path(root, block, index=place, count=count, path=path)
    match opening.blocks:
        case (made,):
            expected = first_block(challenge_id)
        case (made, before):
            expected = next_block(challenge_id, index, before, bytes(_BLOCK))
        case (made, before, partner):
            expected = next_block(challenge_id, index, before, partner)
        case _:
            raise AssertionError(len(opening.blocks))
    if made != expected:
        raise VerificationFailed(f"block {index} of the memory does not follow from the blocks before it")


# --- cards -------------------------------------------------------------------------------------------------
def open_challenge(envelope: bytes, *, network: bytes) -> tuple[BenchChallenge, bytes]:
    """A signed challenge and its id. Raises RemoteProtocolError subclasses."""
    record, record_id, signers = open_record(envelope, network=network)
    if not isinstance(record, BenchChallenge) or signers != {record.challenger}:
        raise VerificationFailed("not a challenge signed by its challenger")
    _bound(record)
    if not record.created_ns < record.expires_ns <= record.created_ns + params.RECORD_LIFETIME_NS_MAX:
        raise MalformedRecord("a challenge lives longer than a day, or no time at all")
    return record, record_id


def open_card(envelope: bytes, *, network: bytes, now_ns: int) -> OpenCard:
    """Check everything about a card but its evidence (`check_work`) and whether its challenger can be trusted.

    Raises RemoteProtocolError subclasses: forged or missing signatures, another peer's challenge, a time outside the
    challenge's window, a card that is expired, from the future, or made to live too long.
    """
    card, card_id, signers = open_record(envelope, network=network)
    if not isinstance(card, BenchCard):
        raise MalformedRecord(f"a {type(card).__name__.lower()} is no bench card")
    if signers != {card.peer, card.challenger}:
        raise VerificationFailed("a bench card needs the signatures of its peer and of its challenger")
    return _opened(card, card_id, network=network, now_ns=now_ns)


def open_unwitnessed(envelope: bytes, *, network: bytes, now_ns: int) -> OpenCard:
    """As `open_card`, for the challenger who is to sign: with the peer's signature alone."""
    card, card_id, signers = open_record(envelope, network=network)
    if not isinstance(card, BenchCard) or signers != {card.peer}:
        raise VerificationFailed("not a bench card signed by its peer alone")
    return _opened(card, card_id, network=network, now_ns=now_ns)


def _opened(card: BenchCard, card_id: bytes, *, network: bytes, now_ns: int) -> OpenCard:
    challenge, challenge_id = open_challenge(card.challenge, network=network)
    if (challenge.peer, challenge.challenger) != (card.peer, card.challenger):
        raise VerificationFailed("the card answers a challenge of another peer", why="work is bound to one key")
    if card.elapsed_ns > challenge.window_ns:
        took, window = card.elapsed_ns / 1e9, challenge.window_ns / 1e9
        raise VerificationFailed(f"answered {took:.1f} s after the challenge; its window was {window:.1f} s")
    if card.created_ns > now_ns + params.CLOCK_SKEW_NS_MAX:
        raise VerificationFailed(f"card dated {(card.created_ns - now_ns) // 10**9} s in the future")
    if not card.created_ns < card.expires_ns <= card.created_ns + params.BENCH_CARD_LIFETIME_NS:
        raise MalformedRecord("a card lives longer than it may, or no time at all")
    if card.expires_ns <= now_ns:
        raise VerificationFailed(
            f"the card expired {(now_ns - card.expires_ns) // 10**9} s ago", next_step="run `ichiba bench` again"
        )
    grade: Literal["witnessed", "self-timed"] = "self-timed" if card.peer == card.challenger else "witnessed"
    return OpenCard(card, card_id, challenge, challenge_id, grade)


def evidence_id(evidence: bytes) -> bytes:
    """The blob id of a result."""
    size = params.BLOB_CHUNK_BYTES
    return blob_id(manifest_of(evidence[at : at + size] for at in range(0, len(evidence), size)))


def read_card_file(data: bytes) -> CardFile:
    """A card file from hostile bytes. Raises MalformedRecord, LimitExceeded."""
    return decode(CardFile, data, bytes_max=params.BENCH_FILE_BYTES_MAX)


def check_card_file(data: bytes, *, network: bytes, now_ns: int, randbytes: Callable[[int], bytes]) -> OpenCard:
    """Everything that can be checked offline: signatures, terms, times and the whole work. Raises as `open_card`."""
    file = read_card_file(data)
    opened = open_card(file.card, network=network, now_ns=now_ns)
    if evidence_id(file.evidence) != opened.card.evidence:
        raise VerificationFailed("the file's evidence is not the one its card names")
    check_work(opened.challenge, opened.challenge_id, file.evidence, randbytes=randbytes)
    return opened


def card_file(card: bytes, evidence: bytes) -> bytes:
    """The bytes of a card file."""
    return encode(CardFile(card, evidence))
