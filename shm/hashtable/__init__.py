"""A bounded table from 64-bit keys to sets of small numbers (members): one writer, lock-free vectorised readers.

Keys are hashes, spread evenly, never 0. Every key has one bucket of 8 places and lives nowhere else, so a probe is
one gather, and a deletion cannot break a probe chain: there is none. A full bucket gives up its least recently
used key, so the table never refuses and never grows.

    sequence  (buckets,)      odd while keys of the bucket change
    keys      (buckets, 8)    0 = the place is free
    members   (buckets x 8,)  the key's set, one word, see below
    uses      (buckets x 8,)  tick of the last use << 24 | how often used of late, in 1/256
    pool      (pool, words)   bitmaps of the sets that a word cannot hold
    cells     TICK, STAMP, INSERTED

A set of up to four members is one word of four 16-bit fields (member + 1, 0 = none), the newest lowest, so that
adding one is a single store. A larger set is a bitmap in the pool, shared by all keys that have the same one: the word
is then negative and holds the bitmap's place and the stamp of its allocation. Keys used together have the same set, in
runs (the blocks of one prompt), and that is how both halves treat them: Python per run, numpy per key. When the
pool is used up, a set keeps its four newest members, and a bitmap that others share stays as it is.

Memory: 24 bytes for a key, 8 for a bucket, `members / 8` for a bitmap. 1,048,576 keys, 1,024 members and 4,096 bitmaps
take 25.5 MiB. A bucket's keys are one cache line.

Ticks. `tick` is the caller's count of uses (not a clock); a key's recent uses fade by a factor e in `HORIZON` ticks.

Order of stores, and what a reader may see if the writer dies behind each:

    a known key gets a member                  a new key (INSERTED has been counted)
      1  pool bitmap, if one is allocated        1  sequence := odd      the bucket reads as empty until the take-over
      2  members := new word                     2  keys := 0            from here on: the place is free
      3  uses                                    3  members := word
                                                 4  uses
                                                 5  keys := key          from here on: the key with its set
                                                 6  sequence := even     readers see the bucket again

    forgetting a key:  1, 2, 6, and members and uses are left as they are.

Each store covers a vector; dying in the midst of one leaves some keys before it and some behind it. So a key may have
an older set or none, and never another key's. A reader loads in the order sequence, keys, members, pool, members again,
sequence again, and takes a place for empty if its sequence moved or is odd, or its word moved while a bitmap was read:

* without the sequence: (1) the reader finds its key, (2) the writer gives the place to another key and stores that
  one's set, (3) the reader loads the set. Loading the key again is not enough: the first key may be back by then.
* without the stamp: (1) the reader loads a word that names a bitmap, (2) the set shrinks to a word, the bitmap is
  given to another set, (3) the reader loads it. With it, the word can never come back: stamps are not used twice.

A bit set or cleared in a shared bitmap needs no more: it is true of every key that names the bitmap.
These are store-store and load-load orders, which x86-64 keeps (see `shm.fence`).

Where there was a compiler at installation, `_table.c` does the look-up, and enters keys whose sets take no new
bitmap: the same loads and stores in the same order, several times cheaper.
"""

from shm.hashtable.layout import HORIZON, MAX_MEMBERS, WAYS, blocks
from shm.hashtable.reader import Found, TableReader
from shm.hashtable.writer import TableWriter

__all__ = ["HORIZON", "MAX_MEMBERS", "WAYS", "Found", "TableReader", "TableWriter", "blocks"]
