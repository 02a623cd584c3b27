"""How many sequences fit the cache, and how wide their slots must be: arithmetic on the host."""

from dataclasses import dataclass

SMALLEST = 64  # positions in a slot


@dataclass(frozen=True)
class Room:
    """A cache of `tokens` positions for at most `rows` sequences, the longest of which may come to `longest`."""

    tokens: int
    rows: int
    longest: int

    def width(self, reach: int) -> int:
        """The width of slots for sequences that reach so far: a power of two, so that it seldom changes.

        Where the longest sequences fit all at once it never does.
        """
        if self.rows * self.longest <= self.tokens:
            return self.longest
        return min(self.longest, max(SMALLEST, 1 << (reach - 1).bit_length()))

    def fits(self, reaches: list[int]) -> bool:
        """Whether sequences that reach so far fit side by side."""
        return len(reaches) <= self.rows and len(reaches) * self.width(max(reaches)) <= self.tokens
