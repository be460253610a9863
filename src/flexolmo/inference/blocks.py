"""Blocks of memory for keys and values: who holds each, and what prompts they may be found by.

A request holds consecutive blocks for all that it may ever read and write, so attention reads them
from end to end and nothing can run short half-way. Blocks of prompts that have been read are
copied aside, where another request finds them that begins alike; these are given up, the least
lately used first, when a request needs the room. They are found under a key that names the model
and the experts that computed them, and then token by token: what was computed with a source is
nothing that a request without it can find. Knows no tensors.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

FREE, HELD, CACHED = 0, 1, 2

Name = tuple[Hashable, tuple[int, ...]]  # key and ids, which are compared themselves


@dataclass(eq=False)
class CachedBlock:
    """One block of a prompt, after all blocks before it."""

    number: int  # in memory
    after: Any  # whatever else is needed to go on from its end
    siblings: dict[Name, "CachedBlock"]  # all that stand where it stands, and itself
    name: Name
    next: dict[Name, "CachedBlock"] = field(default_factory=dict)


class Blocks:
    """A number of blocks, of so many positions each."""

    def __init__(self, count: int, positions: int):
        self.count, self.positions = count, positions
        self._kinds = bytearray(count)
        self._first: dict[Name, CachedBlock] = {}
        # from the least lately used; what stands after a block is before it here
        self._cached: OrderedDict[CachedBlock, None] = OrderedDict()

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds and no prompt is found by."""
        return self._kinds.count(FREE)

    @property
    def num_cached(self) -> int:
        """Blocks that prompts are found by."""
        return len(self._cached)

    def needed(self, num_positions: int) -> int:
        """Blocks for so many positions."""
        return -(-num_positions // self.positions)

    def hold(self, count: int) -> range | None:
        """Consecutive blocks for a request, or None as long as others hold too much."""
        if self._kinds.replace(bytes([CACHED]), bytes([FREE])).find(bytes(count)) < 0:
            return None
        while (start := self._kinds.find(bytes(count))) < 0:
            self._give_up()
        self._kinds[start : start + count] = bytes([HELD]) * count
        return range(start, start + count)

    def release(self, held: range) -> None:
        """Take back what a request held."""
        self._kinds[held.start : held.stop] = bytes(len(held))

    def find(self, key: Hashable, ids: Sequence[int]) -> list[CachedBlock]:
        """The longest chain of blocks under `key` that `ids` begin with."""
        found: list[CachedBlock] = []
        here = self._first
        for name in self._names(key, ids):
            if name not in here:
                break
            found.append(here[name])
            here = found[-1].next
        self._use(found)
        return found

    def keep(
        self, key: Hashable, ids: Sequence[int], after: Sequence[Any]
    ) -> list[tuple[int, CachedBlock]]:
        """Keep the whole blocks of `ids` under `key`, with `after` of each, in place of others or
        as far as there is room. Returns those that are new, and their places among all of them; the
        caller fills them."""
        new = []
        chain = self.find(key, ids)
        for name, behind in list(zip(self._names(key, ids), after, strict=True))[len(chain) :]:
            if FREE not in self._kinds and self._cached and next(iter(self._cached)) not in chain:
                self._give_up()
            number = self._kinds.rfind(FREE)
            if number < 0:
                break
            here = chain[-1].next if chain else self._first
            here[name] = CachedBlock(number, behind, here, name)
            self._kinds[number] = CACHED
            new.append((len(chain), here[name]))
            chain.append(here[name])
            self._use(chain)
        return new

    def forget(self, is_gone: Callable[[Any], bool]) -> None:
        """Give up all blocks under keys of which `is_gone` says so."""
        gone = [block for (key, _), block in self._first.items() if is_gone(key)]
        while gone:
            block = gone.pop()
            gone += block.next.values()
            self._drop(block)

    def _names(self, key: Hashable, ids: Sequence[int]) -> list[Name]:
        size = self.positions
        ends = range(size, len(ids) + 1, size)
        return [(key, tuple(ids[end - size : end])) for end in ends]

    def _use(self, chain: Sequence[CachedBlock]) -> None:
        """Make a chain from a text's start the most lately used, its first block most of all."""
        for block in reversed(chain):
            self._cached[block] = None
            self._cached.move_to_end(block)

    def _give_up(self) -> None:
        """Drop the block least lately used, after which none stands."""
        self._drop(next(iter(self._cached)))

    def _drop(self, block: CachedBlock) -> None:
        del self._cached[block], block.siblings[block.name]
        self._kinds[block.number] = FREE
