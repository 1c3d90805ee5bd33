"""Sums over shards in a fixed order: a binary tree over the shard numbers, whichever rank has which shards.

Shards 2i and 2i + 1 are added first, then the sums of neighbouring pairs, and so on, as in pairwise summation
(Higham, SIAM J. Sci. Comput. 14 (1993), section 2). A node is (level, index): it holds the sum of the shards from
index * 2^level up to (index + 1) * 2^level. A node without a right neighbour moves up unchanged. Each addition has two
operands, so their order does not matter: the root is bitwise identical for any placement of the shards, and the number
of additions is the same as for any other order.
"""

from collections.abc import Callable, Iterable
from typing import TypeVar

T = TypeVar("T")
Node = tuple[int, int]


def add_node(nodes: dict[Node, T], node: Node, value: T, count: int, add: Callable[[T, T], T]) -> None:
    """Add `value` to `nodes` of a tree over `count` shards, and replace each complete pair of neighbours by its sum, up
    to the root if possible."""
    level, index = node
    while node != root(count):
        neighbour = (level, index ^ 1)
        if neighbour in nodes:
            value = add(nodes.pop(neighbour), value)
        elif (index ^ 1) << level < count:
            break
        level, index = node = (level + 1, index >> 1)
    nodes[node] = value


def root(count: int) -> Node:
    """Return the node that holds the sum of all `count` shards."""
    return (count - 1).bit_length(), 0


def nodes_of(shards: Iterable[int], count: int) -> list[Node]:
    """Return the nodes that remain after summing `shards`, in the order in which `add_node` leaves them."""
    nodes: dict[Node, None] = {}
    for shard in shards:
        add_node(nodes, (0, shard), None, count, lambda left, right: None)
    return list(nodes)
