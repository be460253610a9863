"""Merkle tree over a log's entries, as RFC 9162, section 2.1, defines it: roots and proofs.

An append costs O(log n) time at worst, and all that it needs of the leaves before is O(log n)
hashes. A proof is a list of roots of ranges of leaves: `inclusion_ranges` and `consistency_ranges`
say of which, `hash_ranges` computes them in one pass. Knows nothing of entries or files.
"""

import functools
import hashlib
from collections.abc import Iterable, Sequence
from itertools import islice

EMPTY_ROOT = hashlib.sha256(b"").digest()
Range = tuple[int, int]  # number of its first leaf, and of the first leaf after it


def hash_leaf(entry: bytes) -> bytes:
    """The 32 bytes of a leaf. Source: RFC 9162, section 2.1.1."""
    return hashlib.sha256(b"\0" + entry).digest()


def hash_node(left: bytes, right: bytes) -> bytes:
    """The 32 bytes of the node above two. Source: RFC 9162, section 2.1.1."""
    return hashlib.sha256(b"\1" + left + right).digest()


class Frontier:
    """A tree that grows: the roots of the perfect subtrees that its leaves fall into, widest first.

    There is one subtree for each bit that is set in `size`.
    """

    def __init__(self, size: int = 0, hashes: Iterable[bytes] = ()):
        self.size = size
        self.hashes = list(hashes)
        if len(self.hashes) != size.bit_count():
            raise ValueError(f"{len(self.hashes)} subtrees for {size} leaves")

    def copy(self) -> "Frontier":
        """A tree of the same leaves that grows apart."""
        return Frontier(self.size, self.hashes)

    def append(self, leaf: bytes) -> None:
        """Add the hash of one more leaf."""
        node, size = leaf, self.size
        while size & 1:  # a subtree as wide as `node` stands to its left
            node = hash_node(self.hashes.pop(), node)
            size >>= 1
        self.hashes.append(node)
        self.size += 1

    def root(self) -> bytes:
        """The tree's root. Source: RFC 9162, section 2.1.1, MTH."""
        if not self.hashes:
            return EMPTY_ROOT
        return functools.reduce(lambda right, left: hash_node(left, right), reversed(self.hashes))


# --- proofs -------------------------------------------------------------------------------------


def _middle(start: int, stop: int) -> int:
    """The leaf at which a tree over two or more leaves parts: a power of two from its start."""
    return start + (1 << ((stop - start - 1).bit_length() - 1))


def inclusion_ranges(index: int, size: int) -> list[Range]:
    """Ranges whose roots prove leaf `index` in a tree of `size`. Source: section 2.1.3.1, PATH."""
    if not 0 <= index < size:
        raise ValueError(f"leaf {index} of a tree of {size}")
    start, stop = 0, size
    ranges = []
    while stop - start > 1:
        middle = _middle(start, stop)
        if index < middle:
            ranges.append((middle, stop))
            stop = middle
        else:
            ranges.append((start, middle))
            start = middle
    return ranges[::-1]


def consistency_ranges(old: int, new: int) -> list[Range]:
    """Ranges whose roots prove that a tree of `new` leaves begins with the tree of its first `old`.

    None where the two are one tree, nor for an empty one. Source: section 2.1.4.1, PROOF.
    """
    if not 0 <= old <= new:
        raise ValueError(f"a tree of {old} before one of {new}")
    if old == 0:
        return []
    start, stop = 0, new
    ranges = []
    while stop != old:
        middle = _middle(start, stop)
        if old <= middle:
            ranges.append((middle, stop))
            stop = middle
        else:
            ranges.append((start, middle))
            start = middle
    if start > 0:  # the old tree's last part; where it is the old tree, its root is known
        ranges.append((start, stop))
    return ranges[::-1]


def hash_ranges(leaves: Iterable[bytes], ranges: Sequence[Range]) -> list[bytes]:
    """The root of each of `ranges`, which do not overlap; ValueError if there are fewer leaves."""
    rest = iter(leaves)
    root_of, at = {}, 0
    for start, stop in sorted(ranges):
        part = Frontier()
        for leaf in islice(rest, start - at, stop - at):
            part.append(leaf)
        if part.size < stop - start:
            raise ValueError(f"the leaves end before number {stop}")
        root_of[start, stop] = part.root()
        at = stop
    return [root_of[r] for r in ranges]


def is_included(leaf: bytes, index: int, size: int, root: bytes, proof: Sequence[bytes]) -> bool:
    """True if `proof` shows that `leaf` is number `index` in the tree of that size and root."""
    ranges = inclusion_ranges(index, size)
    if len(proof) != len(ranges):
        return False
    node = leaf
    for (start, _), other in zip(ranges, proof, strict=True):
        node = hash_node(node, other) if start > index else hash_node(other, node)
    return node == root


def is_consistent(
    old: int, new: int, old_root: bytes, new_root: bytes, proof: Sequence[bytes]
) -> bool:
    """True if `proof` shows that the tree `new` (size, root) begins with the tree `old`."""
    ranges = consistency_ranges(old, new)
    if len(proof) != len(ranges):
        return False
    if old == 0:
        return old_root == EMPTY_ROOT
    parts = list(zip(ranges, proof, strict=True))
    node = old_root
    if parts and parts[0][0][1] == old:
        node = parts.pop(0)[1]
    begins = whole = node
    for (start, _), other in parts:
        if start < old:
            begins = hash_node(other, begins)
            whole = hash_node(other, whole)
        else:
            whole = hash_node(whole, other)
    return (begins, whole) == (old_root, new_root)
