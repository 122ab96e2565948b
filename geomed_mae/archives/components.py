"""Connected components: who belongs together when some pairs are known to (Tarjan 1975, union-find with halving)."""

from __future__ import annotations


class Components:
    """Nodes 0 to `count` - 1, at first each alone."""

    def __init__(self, count: int) -> None:
        self._parent = list(range(count))

    def of(self, node: int) -> int:
        """Return the number of the component of `node`: that of one of its members."""
        parent = self._parent
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    def join(self, one: int, other: int) -> None:
        """Make the components of two nodes one."""
        self._parent[self.of(one)] = self.of(other)

    def numbers(self) -> list[int]:
        """Return the component of every node."""
        return [self.of(node) for node in range(len(self._parent))]
