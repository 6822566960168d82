"""Shows the first examples of a job as text and tokens, with what is learned marked. The functions are pure.

On a terminal, colours say what is learned and what is cut off. In a pipe, marks say it, as `wdiff` writes them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from rich.text import Text

from finetune_core.contract.first_examples import ShownExample, TextPiece, TokenUse

SHOWN_CHARACTERS = 2000
"""Largest number of characters of a piece of text that is shown."""
SHOWN_TOKENS = 120
"""Largest number of tokens of a piece that are shown."""
_STYLES = {TokenUse.READ: "dim", TokenUse.LEARNED: "bold green", TokenUse.CUT_OFF: "red strike"}
_MARKS = {TokenUse.READ: ("", ""), TokenUse.LEARNED: ("{+", "+}"), TokenUse.CUT_OFF: ("[-", "-]")}
_LEGEND = {TokenUse.LEARNED: "learned", TokenUse.READ: "only read", TokenUse.CUT_OFF: "cut off"}


def example_lines(examples: Sequence[ShownExample], *, marks: bool) -> Iterator[Text]:
    """Yield the lines about ``examples``. ``marks`` is true where the output has no colours."""
    yield _legend(marks=marks)
    for number, example in enumerate(examples, 1):
        yield Text()
        counts = _counts(example)
        yield Text(f"example {number}: {example.place}{counts}", style="bold")
        if example.left_out:
            yield Text(f"  left out: it {example.left_out}", style="yellow")
            continue
        yield Text("  text: ").append_text(_joined(example.pieces, _text_of, "", marks=marks))
        yield Text("  tokens: ").append_text(_joined(example.pieces, _tokens_of, " ", marks=marks))


def _legend(*, marks: bool) -> Text:
    line = Text("first examples: ")
    for number, (use, what) in enumerate(_LEGEND.items()):
        line.append(", " if number else "")
        before, behind = _MARKS[use] if marks else ("", "")
        line.append(f"{before}{what}{behind}", style=_STYLES[use])
    return line


def _counts(example: ShownExample) -> str:
    counts = {use: sum(len(piece.ids) for piece in example.pieces if piece.use is use) for use in TokenUse}
    if example.left_out:
        return ""
    cut = f", {counts[TokenUse.CUT_OFF]} cut off" if counts[TokenUse.CUT_OFF] else ""
    return f", {counts[TokenUse.READ]} tokens read, {counts[TokenUse.LEARNED]} learned{cut}"


def _joined(pieces: Sequence[TextPiece], words: Callable[[TextPiece], str], between: str, *, marks: bool) -> Text:
    line = Text()
    for number, piece in enumerate(pieces):
        before, behind = _MARKS[piece.use] if marks else ("", "")
        line.append(between if number else "")
        line.append(f"{before}{words(piece)}{behind}", style=_STYLES[piece.use])
    return line


def _text_of(piece: TextPiece) -> str:
    """Return the text in one line, with `\\n` for a line end."""
    text = piece.text.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t")
    return _shortened(text, SHOWN_CHARACTERS)


def _tokens_of(piece: TextPiece) -> str:
    shown = [f"{number}:{token}" for number, token in zip(piece.ids, piece.tokens, strict=True)][:SHOWN_TOKENS]
    more = len(piece.ids) - len(shown)
    return " ".join(shown) + (f" … {more} more" if more else "")


def _shortened(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[:most]}… {len(text) - most} more characters"
