"""The control reward: a coin flip. What it teaches is not a lift; a real reward has to beat it."""

import hashlib

from common.trajectory import Task


def coin_flip(response: str, task: Task) -> float:
    """0 or 1 by a hash of the task and the response: `reward.function=benchmarks.coin_flip:coin_flip`."""
    digest = hashlib.blake2b(f"{task.id}\x1f{response}".encode("utf-8", "surrogatepass"), digest_size=1).digest()
    return float(digest[0] & 1)
