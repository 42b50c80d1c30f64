"""FastDeploy's global scheduler, written anew from its described behaviour: every instance is a node with its own list.

A node with room pops its own list first. When that gave nothing, one node is drawn at random from those whose lists
hold at least `min_load_score` requests, and the head of its list is taken: half of the room, rounded up. A popped
request arrives one round trip later; that a node can steal is known to it at once, which flatters the original.
"""

from __future__ import annotations

from collections import deque
from random import Random

from benchmarks.skew.cluster import ROUND_TRIP_S, Counts
from benchmarks.skew.workload import Request, Workload
from benchmarks.skew.world import Instance, World


class Node:
    """A list, and the instances that pop it."""

    def __init__(self, world: World, workload: Workload, instances: int) -> None:
        self.instances = [Instance(world, workload) for _ in range(instances)]
        self.under_way = [0] * instances
        self.list: deque[Request] = deque()

    def room(self) -> tuple[int, int]:
        """The most of an instance, and which one."""
        rooms = [each.room - away for each, away in zip(self.instances, self.under_way, strict=True)]
        return max(rooms), rooms.index(max(rooms))


class FastDeploy:
    def __init__(
        self, world: World, workload: Workload, nodes: int, instances: int, min_load_score: int, seed: str
    ) -> None:
        self._world = world
        self._nodes = [Node(world, workload, instances) for _ in range(nodes)]
        self._min = min_load_score
        self._rng = Random(seed)
        self.counts = Counts()

    def arrive(self, request: Request, node: int) -> None:
        self._nodes[node].list.append(request)
        self._pump()

    def _pump(self) -> None:
        """Everybody with room pops; who comes first is chance."""
        for node in self._rng.sample(self._nodes, len(self._nodes)):
            while node.list and node.room()[0] > 0:
                self._take(node, node.list.popleft())
        for thief in self._rng.sample(self._nodes, len(self._nodes)):
            while not thief.list and (room := thief.room()[0]) > 0:
                victims = [node for node in self._nodes if len(node.list) >= self._min]
                if not victims:
                    return
                victim = self._rng.choice(victims)
                for _ in range(min(-(-room // 2), len(victim.list))):
                    request = victim.list.popleft()
                    request.stolen = True
                    self._take(thief, request)

    def _take(self, node: Node, request: Request) -> None:
        slot = node.room()[1]
        node.under_way[slot] += 1
        delay = ROUND_TRIP_S if request.stolen else 0.0
        self._world.after(delay, lambda: self._run(node, slot, request))

    def _run(self, node: Node, slot: int, request: Request) -> None:
        node.under_way[slot] -= 1
        node.instances[slot].run(request, self._pump)
