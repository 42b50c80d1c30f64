"""`penstock serve` with other children: python -m tests.support.standins.supervisor MODULE=OTHER... serve FLAGS...

`supervisor=OTHER` imports OTHER here, for what it changes.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence

from broker import cli
from broker.supervisor import Child


def main() -> None:
    given = sys.argv[1 : sys.argv.index("serve")]
    instead = dict(pair.split("=") for pair in given)
    sys.argv[1 : 1 + len(given)] = []
    if "supervisor" in instead:
        importlib.import_module(instead["supervisor"])
    real = Child.__init__

    def make(
        self: Child,
        name: str,
        command: Callable[[int, int], Sequence[str]],
        row: int | None = None,
        *,
        quiet: bool = False,
    ) -> None:
        def other(life: int, ready_fd: int) -> Sequence[str]:
            return [instead.get(word, word) for word in command(life, ready_fd)]

        real(self, name, other, row, quiet=quiet)

    Child.__init__ = make  # type: ignore[method-assign]  # in this process, for good
    cli.main()


if __name__ == "__main__":
    main()
