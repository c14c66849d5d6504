"""The simulator's long run: every worker is killed, and frozen, at every delivery of a run of three requests.

python -m tests.model.crashes [seeds]
"""

from __future__ import annotations

import sys
import time

from tests.faults import sims
from tests.faults.test_handoff import act_at, freeze_for, num_events
from tests.model.simulator import Simulation

VICTIMS = ("p0", "p1", "d0", "d1")


def main(seeds: int = 2) -> int:
    for seed in range(1, seeds + 1):
        sims.IN_PLACE = bool(seed % 2)  # both ways
        began, count = time.monotonic(), num_events(seed)
        for number in range(1, count + 1):
            for victim in VICTIMS:
                act_at(number, victim, Simulation.kill, seed)
        for number in range(1, count + 1, 5):
            for victim in VICTIMS:
                act_at(number, victim, freeze_for(5.0), seed)
        runs = len(VICTIMS) * (count + -(-count // 5))
        print(f"seed {seed}: {runs} runs of {count} deliveries, no wrong token, nothing held  {time.monotonic() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
