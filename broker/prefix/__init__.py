"""The shared prefix index: which instance has been sent which beginnings of prompts.

A prompt is cut into full blocks; block k's key is a 64-bit hash of everything up to and with block k, so that equal
keys mean equal prefixes, and "who has seen the first k blocks" is one look-up per block, all of them at once.

    frontend   PrefixIndex    text -> keys -> Match       note() -> Overlay + outbox -> RoutingNotices (control.sock)
    scheduler  PrefixWriter   RoutingNotices -> shm.hashtable; forgets instances, ages

The index remembers what was *sent*; what an engine has evicted since it is not told. A frontend sees its own notices at
once, through the overlay, and others' when the scheduler has applied them. Notices may be lost (a full socket, a
scheduler that is away): then a prefix is forgotten or counted less, nothing else. Nobody ever waits for one.

The table may lose any block of a prompt, since it evicts by bucket. A key stands for all that is in front of it, so an
instance has been sent as much as the deepest of its keys says, whatever is missing before.
"""

from broker.prefix.index import PrefixIndex
from broker.prefix.layout import PREFIX, create_prefix, prefix_layout, run_layout
from broker.prefix.match import Match
from broker.prefix.writer import PrefixWriter

__all__ = ["PREFIX", "Match", "PrefixIndex", "PrefixWriter", "create_prefix", "prefix_layout", "run_layout"]
