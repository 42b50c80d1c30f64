"""`python -m benchmarks.skew`: the two tables."""

from __future__ import annotations

from benchmarks.skew.contest import contest, lines
from benchmarks.skew.workload import Workload


def main() -> None:
    workload = Workload.load()
    for shape in workload.shapes:
        for line in lines(workload, shape, contest(workload, shape)):
            print(line)
        print()


if __name__ == "__main__":
    main()
