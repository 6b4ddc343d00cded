"""`scope="prompt"`: text may be forgotten as well, but for the first tokens and the last ones."""

from collections.abc import Sequence

from purekv.errors import PureKVError
from purekv.layout import Layout, VisualSpan

SINKS = 4
"""First tokens of a prompt, which attention rests on (StreamingLLM, arXiv:2309.17453)."""
WINDOW = 32
"""Last tokens that stay and observe, where no visual token tells where the question begins."""


def prompt_layout(layout: Layout, window: int | str) -> Layout:
    """The same prompt with one span a row: all tokens but the sinks and the observation window.

    Args:
        layout: of the prompt, on the CPU.
        window: "question" for the text behind the last visual token (the last `WINDOW` tokens in
            rows without one), or N for the last N tokens.

    Raises:
        PureKVError: a row has padding between its tokens.
    """
    rows = zip(layout.is_token, layout.spans, strict=True)
    return Layout.build(
        layout.is_token,
        [_span(row, is_token.nonzero().flatten().tolist(), spans, window)
         for row, (is_token, spans) in enumerate(rows)],
    )  # fmt: skip


def _span(
    row: int, tokens: Sequence[int], spans: Sequence[VisualSpan], window: int | str
) -> list[VisualSpan]:
    """None in rows that are too short."""
    if not tokens:
        return []
    first, stop = tokens[0], tokens[-1] + 1
    if stop - first != len(tokens):
        raise PureKVError(
            f'row {row} has padding between its tokens, which scope="prompt" cannot skip; pad on '
            'one side, as the tokenizer does, or use scope="visual"'
        )
    start = first + SINKS
    if window != "question":
        stop -= int(window)
    elif spans and spans[-1].stop < stop:
        stop = spans[-1].stop
    else:
        stop -= WINDOW
    return [VisualSpan(start, (1, 1, stop - start), "prompt")] if stop > start else []
