"""The process in which math-verify runs. It ends itself when a comparison overruns; `math_reward` starts another.

Started as a script with the CPU seconds that one comparison may take. Each line in is a JSON pair [answer, reference],
each line out is `true` or `false`. math-verify's own time limit is an alarm with a Python handler, which neither stops
a long operation inside C nor works outside a main thread; the default action of these timers kills the process always.
"""

import contextlib
import json
import os
import resource
import signal
import sys
from pathlib import Path

WALL_SECONDS = 30.0  # far beyond the CPU limit, so that a busy machine changes no verdict
START_SECONDS = 300.0
MEMORY_BYTES = 4 * 2**30


def limit(cpu: float, wall: float) -> None:
    """Arm both timers; zeros disarm them."""
    signal.setitimer(signal.ITIMER_PROF, cpu)
    signal.setitimer(signal.ITIMER_REAL, wall)


def serve(cpu_seconds: float) -> None:
    """Answer lines until the input ends."""
    for number in (signal.SIGALRM, signal.SIGPROF):
        signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
    limit(START_SECONDS, START_SECONDS)
    with contextlib.suppress(OSError, ValueError):  # some systems have no such limit
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    answers = os.fdopen(os.dup(1), "w")  # whatever a library prints must not be taken for an answer
    sys.path.append(str(Path(__file__).resolve().parents[1]))  # at the end, where it stands in for no library
    from reward.math_compare import compare

    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    answers.write("ready\n")
    answers.flush()
    os.dup2(nowhere, 2)
    limit(0, 0)
    for line in sys.stdin:
        limit(cpu_seconds, WALL_SECONDS)
        try:
            equal = compare(*json.loads(line))
        except Exception:  # whatever the parser stumbles over (recursion, memory) is no proof of equality
            equal = False
        limit(0, 0)
        answers.write(json.dumps(equal) + "\n")
        answers.flush()


if __name__ == "__main__":
    serve(float(sys.argv[1]))
