"""What is supported and how it is tested: for `purekv families` and docs/families.md.

python -m purekv.families.table docs/families.md    # writes the table between its marks
"""

import re
import sys
from pathlib import Path
from typing import Any

from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from purekv.families import FAMILIES, GENERIC
from purekv.families.base import Family

BEGIN, END = "<!-- families: begin -->", "<!-- families: end -->"


def rows() -> list[dict[str, Any]]:
    """One a family, in the order of the registry; `present` where the installed transformers, or
    purekv itself, has its models."""
    return [_row(family) for family in [*dict.fromkeys(FAMILIES.values()), GENERIC]]


def _row(family: Family) -> dict[str, Any]:
    return {
        "family": family.name,
        "model_types": list(family.model_types),
        "present": not family.native or all(name in CONFIG_MAPPING for name in family.model_types),
        "checkpoints": list(family.checkpoints),
        "modalities": list(family.modalities),
        "attention": list(family.attention),
        "spatiotemporal": family.sparse,
        "tested_on": list(family.tested_on),
        "limits": family.limits,
    }


def markdown() -> str:
    """The table, one line a row; what depends on the installed transformers is left out."""
    titles = (
        "family", "`model_type`", "checkpoints, e.g.", "modalities", "attention", "sparse prefill",
        "tested on", "limits",
    )  # fmt: skip
    lines = [_line(titles), _line(["---"] * len(titles))]
    for row in rows():
        lines.append(
            _line(
                [
                    row["family"],
                    ", ".join(f"`{name}`" for name in row["model_types"]),
                    ", ".join(row["checkpoints"]),
                    ", ".join(row["modalities"]),
                    ", ".join(row["attention"]),
                    "yes" if row["spatiotemporal"] else "no",
                    "; ".join(row["tested_on"]),
                    row["limits"],
                ]
            )
        )
    return "\n".join(lines)


def _line(cells: Any) -> str:
    return f"| {' | '.join(cells)} |"


def with_table(page: str) -> str:
    """The page with the table of today between its marks."""
    pattern = f"{BEGIN}.*{END}"
    return re.sub(pattern, lambda _: f"{BEGIN}\n{markdown()}\n{END}", page, flags=re.DOTALL)


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.write_text(with_table(target.read_text()))
