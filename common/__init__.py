"""What every part of the project stands on. Importing it has waiting threads sleep."""

import os

# Threads that spin while they wait are quick alone, and hundreds of times slower than one thread where another program
# wants the same core: the one that all wait for is not running, because the others spin. Here, because every script
# imports this package before torch. Where the user set one of these, of GNU's and Intel's OpenMP, nothing is set.
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
if not any(name in os.environ for name in WAITING):
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
