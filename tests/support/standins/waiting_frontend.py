"""The frontend, but its reader waits until every row is whole, as one with a retry loop would."""

from __future__ import annotations

import time

from frontend.__main__ import main
from shm.seqlock import RowReader

_refresh = RowReader.refresh


def refresh(self: RowReader) -> bool:
    while (self._sequence & 1).any():
        time.sleep(0.001)
    return _refresh(self)


if __name__ == "__main__":
    RowReader.refresh = refresh  # type: ignore[method-assign]  # in this process, for good
    main()
