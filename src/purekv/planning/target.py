"""What a plan is for."""

import re
from dataclasses import dataclass

from purekv.errors import PureKVError

_HINT = 'write "kv=0.1", "prefill=3.16x" or "retention=0.99"'


@dataclass(frozen=True)
class Target:
    """ "kv": a share of the visual entries, at the least error. "prefill": a speed-up of the
    language model's prefill, at the least error. "retention": the smallest share of the visual
    entries at which so many next tokens stay what they were."""

    kind: str
    value: float

    @classmethod
    def parse(cls, text: str) -> "Target":
        """Raises PureKVError for what is none of the three, or out of range."""
        found = re.fullmatch(r"(kv|prefill|retention)=([0-9.]+?)(x?)", text.strip())
        try:
            kind, value, times = found.groups() if found else ("", "", "")
            number = float(value)
        except ValueError:
            raise PureKVError(f"target={text!r} is not understood; {_HINT}") from None
        is_speed = kind == "prefill"
        if bool(times) > is_speed or (number <= 1 if is_speed else not 0 < number < 1):
            raise PureKVError(f"target={text!r} is out of range; {_HINT}")
        return cls(kind, number)

    def __str__(self) -> str:
        return f"{self.kind}={self.value:g}" + ("x" if self.kind == "prefill" else "")
