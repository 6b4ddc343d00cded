"""Which blocks of a request are freed, and where the entries that stay are written.

Positions are stable: a token's slot follows from its position alone, before and after. Of a prompt
of N tokens B entries stay, and B = N modulo the block size, so that the entry behind the prompt
still lands where its position says. Entries fill the first B // block_size blocks and the beginning
of the block that holds position N; the blocks between are the hole.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Hole:
    """What is missing from one request's blocks once its prompt was compacted."""

    tokens: int
    """Of the prompt (N)."""
    kept: int
    """Entries that stay in each layer and head (B)."""
    block_size: int

    def __post_init__(self) -> None:
        assert self.block_size <= self.kept < self.tokens, self
        assert (self.tokens - self.kept) % self.block_size == 0, self

    @property
    def first(self) -> int:
        """The first block that is freed."""
        return self.kept // self.block_size

    @property
    def stop(self) -> int:
        """The first block behind the hole; it takes the entries that fill no block, and then the
        tokens that follow."""
        return self.tokens // self.block_size

    @property
    def blocks(self) -> int:
        return self.stop - self.first

    @property
    def entries(self) -> int:
        """By which a sequence gets shorter."""
        return self.tokens - self.kept

    def positions(self) -> list[int]:
        """Whose slots the kept entries take, in order."""
        whole = self.first * self.block_size
        return [*range(whole), *range(whole + self.entries, self.tokens)]


@dataclass(frozen=True)
class Room:
    """How many entries of a prompt stay: a function of its length, which scheduler and workers
    know alike."""

    budget: float | int
    """A share of the prompt's tokens, or a count."""
    least: int
    """Entries that stay at any budget."""
    min_tokens: int
    """Shorter prompts are left as they are."""

    def hole(self, tokens: int, block_size: int) -> Hole | None:
        """What a prompt of that many tokens loses; None where no block would be freed.

        The budget is rounded down to the next count that fits the blocks, so that the promised
        compression is reached, but never below one block or `least`: the first block of a request
        stays its own for as long as it lives.
        """
        if tokens < self.min_tokens:
            return None
        share = isinstance(self.budget, float)
        kept = int(self.budget * tokens + 1e-6) if share else int(self.budget)
        kept -= (kept - tokens) % block_size
        least = max(self.least, block_size)
        if kept < least:
            kept = least + (tokens - least) % block_size
        return Hole(tokens, kept, block_size) if kept < tokens else None
