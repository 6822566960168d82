"""The grader of Number, and the functions that read the number in a text. The grader of GSM8K reads its number with
`read_number_behind`.

`read_only_number` and `read_number_behind` find the place at which a statement begins, and `read_statement` reads the
number there. A statement must begin with the number, apart from markup, quotes and currency signs, and must have no
other number. So a list, a range, a calculation and `5 hours and 30 minutes` state no number.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping
from decimal import Decimal

from finetune_core.api.task import TaskSpec
from finetune_core.tasks import NUMBER
from finetune_trainer.evaluation.graders.grades import Grade

LONGEST_NUMBER = 1000
"""Largest number of characters of a number. A longer number is not read, because no person writes such a number."""
MOST_SCALES = 4
"""Largest number of words such as `million` that can multiply one number, as in `2 hundred thousand`."""

_GAP = "\x1f"
"""Takes the place of removed markup. It separates the texts on its two sides, and is ignored beside a number."""
_MARKUP = re.compile(
    r"\\[()\[\]]|\\(?:boxed|fbox|text|textbf|mathrm|mathbf|mathit|displaystyle|left|right)(?![A-Za-z])|\\[,;!: ]"
    r"|[{}`]|\*\*|__|[\u200b\u2060\ufeff]"
)
"""Markup of Markdown and LaTeX, and invisible characters."""
_THIN_SPACE = re.compile(r"(?<=[0-9])\{?\\,\}?(?=[0-9]{3}(?![0-9]))")
"""The space of LaTeX between groups of three digits."""
_FOREIGN_DIGIT = re.compile(r"(?![0-9])\d")
"""A digit that is not one of the ASCII digits, such as an Arabic one."""
_FORMS = {place: chr(place - 0xFEE0) for place in range(0xFF01, 0xFF5F)} | {0x066B: ".", 0x066C: ","}
"""Full-width characters and Arabic separators, each with the ASCII character of the same meaning."""
_MINUS = str.maketrans(dict.fromkeys("\u2010\u2011\u2012\u2013\u2212\ufe63\uff0d", "-"))
"""Turns hyphens, the en dash and other signs that people type for a minus into `-`."""

_SPACE = r"[^\S\n]*+"
"""White space and removed markup on one line. The quantifier never gives characters back, so that the search takes only
time in proportion to the length of the text."""
_CURRENCY = (
    r"(?:(?:US|CA|AU|NZ|HK|SG|NT|MX|[ACRS])?\\?[$£¥฿\u20a0-\u20c0]"
    r"|(?:USD|EUR|GBP|JPY|CNY|INR|CHF|CAD|AUD|NZD|SEK|NOK|DKK|Rs\.?)(?![A-Za-z]))"
)
_DIGITS = (
    r"(?:[0-9]{1,3}(?:(?:,[0-9]{3})+|(?:[\u0020\u00a0\u2009\u202f][0-9]{3})+|(?:['\u2019][0-9]{3})+)(?![0-9])"
    r"|[0-9]{1,2}(?:,[0-9]{2})+,[0-9]{3}(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+"
)
_SIGN = r"(?:[-+]|(?:minus|negative|Minus|Negative)(?![A-Za-z])|)"
_START = (
    rf"(?P<sign>{_SIGN}){_SPACE}(?P<currency>{_CURRENCY})?{_SPACE}(?P<inner>{_SIGN}){_SPACE}(?P<number>(?>{_DIGITS}))"
)
_NO_MORE = (
    rf"(?![0-9]|[.,][0-9]|[eE][-+]?[0-9]|{_SPACE}[-+/*^:×÷xX]?{_SPACE}[$]?{_SPACE}[0-9]"
    rf"|(?<![0-9.]0)(?<=0)(?:[xX][0-9A-Fa-f]|[oObB][0-7])|{_SPACE}(?:\\(?:pi|sqrt)(?![A-Za-z])|[π√]))"
)
_NUMBER = re.compile(_START + _NO_MORE)
"""A number with its sign and its currency. It is not followed by an exponent, a fraction, a range, a calculation or
further digits, is no factor of a root or of π, and is not the 0 of `0x1F`. Commas, spaces or apostrophes may separate
groups of digits."""
_POWERS = str.maketrans("⁺⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "+-0123456789")
_SCIENTIFIC = re.compile(
    _START
    + rf"(?:[eE](?P<exponent>[-+]?[0-9]{{1,3}})|{_SPACE}(?:[×xX*·⋅]|\\times|\\cdot){_SPACE}10"
    + rf"(?:\^{_SPACE}(?P<power>[-+]?[0-9]{{1,3}})|(?P<raised>[⁺⁻]?[⁰¹²³⁴-⁹]{{1,3}})))"
    + _NO_MORE
)
"""A number with a power of ten behind it, such as `1e-07`, `2.4 × 10^5` or `2.4 × 10⁵`."""
_BEFORE = re.compile(r"[^\S\n]*+(?:[*_\"'“”‘’=:][^\S\n]*+)*+")
"""Text that may come before the number of a statement: markup, quotes, `=` and `:`."""
_LEAD = re.compile(rf"(?:(?:[-+]|\b(?:[Mm]inus|[Nn]egative)\b){_SPACE})?(?:{_CURRENCY}{_SPACE})?[-+]?\.?\Z")
"""The part of a number before its first digit, such as a sign. It is looked for at the end of the text before that
digit."""
_SCALE = re.compile(
    rf"{_SPACE}-?{_SPACE}(?:(?P<k>[kK]|thousands?)|(?P<m>mn|mio|millions?)|(?P<b>bn|billions?)|(?P<t>trillions?)"
    r"|(?P<h>hundreds?)|(?P<l>lakhs?)|(?P<c>crores?)|(?P<d>dozens?))(?![A-Za-z])",
    re.IGNORECASE,
)
"""A word that multiplies the number before it."""
_FACTORS = {"k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12, "h": 100, "l": 10**5, "c": 10**7, "d": 12}
_LETTER_SCALE = re.compile("(?:(?P<m>M)|(?P<b>B))(?![A-Za-z])")
"""Letters directly behind a number that mean millions and billions. Only capital letters do, because `m` may mean
metres."""
_AMOUNT_SCALE = re.compile("[ ]?(?:(?P<m>[mM])|(?P<b>[bB]))(?![A-Za-z])")
"""Letters that mean millions and billions behind an amount of money."""
_END = re.compile(
    rf"\n|[.!?;](?:[\s*_\"'”’]|\Z)|[(\[](?!(?:and|or)\b)|="
    rf"|,(?!{_SPACE}(?:(?:and|or|to)\b)?{_SPACE}[-+]?{_SPACE}{_CURRENCY}?{_SPACE}\.?[0-9])"
)
"""The end of a statement: the end of the line or of the sentence, `=`, or the beginning of a remark in parentheses or
brackets, unless the remark begins with `and` or `or`. A comma also ends the statement unless a number follows the
comma, perhaps behind `and`, `or` or `to`."""
_FURTHER = re.compile(r"(?<![A-Za-zµ°^0-9.])(?<!\^-)[0-9]|[¼-¾⅐-⅞]|(?<![A-Za-zµ°²³¹⁰-⁹⁻])[²³¹⁰-⁹]")
"""A further number. Digits directly behind a letter belong to a unit, such as `m2`."""
_WORDS = re.compile(
    rf"\b(?:and|or|to|plus|times|point){_SPACE}(?:an?{_SPACE})?(?:half|quarters?|thirds?|fifths?"
    r"|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|thirteen|fourteen|fifteen|sixteen|seventeen|eighteen|nineteen|twenty|thirty"
    r"|forty|fifty|sixty|seventy|eighty|ninety|dozens?|hundreds?|thousands?|millions?)\b",
    re.IGNORECASE,
)
"""A further number in words, such as the `and a half` of `2 and a half`."""
_PARTS = re.compile(
    rf"{_SPACE}-?{_SPACE}(?:(?:ten|hundred){_SPACE}-?{_SPACE})?(?:thi|four|fif|six|seven|eigh|nin|ten|eleven|twelf"
    r"|(?:thir|four|fif|six|seven|eigh|nine)teen|(?:twen|thir|for|fif|six|seven|eigh|nine)tie"
    rf"|hundred|thousand|million|billion|trillion)(?:th|(?<=thi)rd)(?:s(?![A-Za-z])|(?={_SPACE}(?:of\b|[.,;!?\n]|\Z)))",
    re.IGNORECASE,
)
"""A word that makes the number before it a fraction, such as the last word of `3 thousandths`. The singular counts only
where no noun follows, because the number of `12 sixth graders` is 12. Halves and quarters are not here, because they
may be things that are counted, such as coins."""
_LINE_BREAK = re.compile("\r\n?|[\x85\u2028\u2029]")
"""Line breaks that are not `\\n`."""
_ANY_DIGIT = re.compile("[0-9]")
_OPERATOR = re.compile(
    r"(?:[√∛∜±∓^/÷×]|(?:\\|\b)(?:sqrt|log|ln|lg|exp|sin|cos|tan)[({]?|\\(?:pm|mp|times|div|cdot|[dt]?frac|binom))\s*\Z"
)
"""An operator that changes the value of the number behind it, such as the sign of a root."""
_DASH = re.compile(rf"(?P<word>[^\W\d_]+)\s+-\s+(?P<behind>(?:{_CURRENCY}{_SPACE})?\.?)\Z")
"""A word, a dash between white space, and the text between the dash and the first digit behind it."""
_BEFORE_MINUS = frozenset({"is", "are", "was", "be", "equals", "equal", "about", "of", "to"})
"""Words behind which a dash is a minus: `it is - 5`."""


def plain(text: str, *, any_script: bool = False) -> str:
    """Return ``text`` without markup, and with `-` in the place of all signs that mean minus. With ``any_script`` the
    digits of all scripts become ASCII digits."""
    if any_script:
        text = _FOREIGN_DIGIT.sub(lambda found: str(unicodedata.decimal(found[0])), text.translate(_FORMS))
    text = _LINE_BREAK.sub("\n", text).translate(_MINUS).replace("{,}", ",")
    return _MARKUP.sub(_GAP, _THIN_SPACE.sub("\u2009", text))


def read_statement(text: str, *, scientific: bool = False) -> Decimal | None:
    """Return the number that the statement at the beginning of ``text`` states. ``text`` must be a result of `plain`.

    None where the statement does not begin with a number, has two signs, or has several numbers. The text behind the
    statement is ignored. With ``scientific`` a power of ten belongs to the number, as in `1e5` and `2.4 × 10^5`.
    """
    before = _BEFORE.match(text)
    start, power = before.end() if before else 0, ""
    found = _SCIENTIFIC.match(text, start) if scientific else None
    if found is not None:
        power = found["exponent"] or found["power"] or found["raised"].translate(_POWERS)
    else:
        found = _NUMBER.match(text, start)
    if found is None or len(found["number"]) > LONGEST_NUMBER:
        return None
    if found["sign"] and found["inner"]:
        return None
    end, factor = found.end(), 1
    scales = [_SCALE, _LETTER_SCALE if found["currency"] is None else _AMOUNT_SCALE]
    for _ in range(MOST_SCALES):
        scale = next((match for pattern in scales if (match := pattern.match(text, end))), None)
        if scale is None:
            break
        factor *= _FACTORS[scale.lastgroup or "k"]
        end = scale.end()
        scales = [_SCALE]
    if _PARTS.match(text, end):
        return None
    ended = _END.search(text, end)
    rest = text[end : ended.start() if ended else len(text)].replace("^" + _GAP, "^")
    if _FURTHER.search(rest) or _WORDS.search(rest):
        return None
    _, digits, places = Decimal(re.sub(r"[^0-9.]", "", found["number"])).as_tuple()
    assert isinstance(places, int)
    # The product is one of whole numbers, because decimals round a product to 28 digits.
    product = int("".join(map(str, digits))) * factor
    is_negative = (found["sign"] + found["inner"]) not in ("", "+")
    return Decimal((int(is_negative), tuple(map(int, str(product))), places + int(power or 0)))


def read_only_number(text: str) -> Decimal | None:
    """Return the only number in ``text``, which may have words around the number. None where the text has no number or
    several, or where a letter or an operator is directly before the number (see `_start`)."""
    text = plain(text, any_script=True)
    digit = _ANY_DIGIT.search(text)
    if digit is None:
        return None
    start = _start(text, digit.start())
    if start is None:
        return None
    number = read_statement(text[start:], scientific=True)
    ended = _END.search(text, digit.start())
    if number is None or (ended is not None and _number_follows(text[ended.start() :])):
        return None
    return number


def read_number_behind(marker: str, text: str, *, any_notation: bool = False) -> Decimal | None:
    """Return the number that is stated behind ``marker``. The number is on the same line as the marker, or on the next
    line that is not blank if the rest of the marker's line is blank.

    If the text has several markers, the first marker with a number behind it counts. If a marker has several numbers
    behind it, or a number that can't be read, None is returned, and no further marker is looked at. With
    ``any_notation`` digits of all scripts and powers of ten are read too. The grader of GSM8K does not read these.
    """
    text, mark = (plain(part, any_script=any_notation) for part in (text, marker))
    # A marker counts only if its first and last character are not repeated beside it: `#####` is not the marker `####`.
    pattern = re.compile(f"(?<!{re.escape(mark[0])}){re.escape(mark)}(?!{re.escape(mark[-1])})")
    places = [found.span() for found in pattern.finditer(text)]
    ends = [start for start, _ in places[1:]] + [len(text)]
    for (_, start), end in zip(places, ends, strict=False):
        statement = text[start:end].lstrip()
        number = read_statement(statement, scientific=any_notation)
        if number is not None:
            return number
        if _ANY_DIGIT.search(statement.partition("\n")[0]):
            return None
    return None


def _start(text: str, digit: int) -> int | None:
    """Return where a number begins, with its sign and its currency. ``digit`` is the index of the number's first digit
    in ``text``. None where a letter, the sign of a root or another operator is directly before the number."""
    before = text[max(0, digit - 24) : digit]
    lead = _LEAD.search(before)
    start = digit - (len(before) - lead.start() if lead else 0)
    before = text[max(0, start - 24) : start]
    if (before and (before[-1].isalnum() or before[-1] in "-+.,")) or _OPERATOR.search(before):
        return None
    dash = _DASH.search(before + text[start:digit])
    if dash is None or dash["word"].lower() in _BEFORE_MINUS:
        return start
    # A dash behind a word is no sign. A dash behind a single letter means a subtraction.
    return digit - len(dash["behind"]) if len(dash["word"]) > 1 else None


def _number_follows(text: str) -> bool:
    """Return whether ``text``, which follows behind a statement, states a further number."""
    return _FURTHER.search(text) is not None


def number_grader(spec: TaskSpec) -> Callable[[str, Mapping[str, object]], Grade]:
    """Return the grader of the task Number with the arguments of ``spec``."""
    tolerance, relative = Decimal(spec.tolerance or 0), Decimal(spec.relative_tolerance or 0)
    marker = spec.marker

    def read(text: str) -> Decimal | None:
        return read_only_number(text) if marker is None else read_number_behind(marker, text, any_notation=True)

    def grade(answer: str, row: Mapping[str, object]) -> Grade:
        value = row.get("answer")
        if isinstance(value, (int, float, Decimal)) and not isinstance(value, bool):
            reference = _decimal(value)
        else:
            reference = read(value) if isinstance(value, str) else None
        if reference is None:
            return Grade.left_out("the row states no number, or several")
        number = read(answer)
        if number is None:
            return Grade.of(NUMBER, {}, problem="the answer states no number, or several")
        return Grade.of(NUMBER, {"exact": is_near(number, reference, tolerance, relative)})

    return grade


def is_near(number: Decimal, reference: Decimal, tolerance: Decimal, relative: Decimal) -> bool:
    """Return whether ``number`` and ``reference`` differ by at most ``tolerance``, or by at most ``relative`` times the
    absolute value of ``reference``."""
    if number == reference:
        return True
    difference = abs(number - reference)
    return difference <= tolerance or difference <= relative * abs(reference)


def _decimal(value: float | Decimal) -> Decimal | None:
    """Return a number of a data file as a decimal; None where it is not finite."""
    if isinstance(value, int):
        return Decimal(value)
    number = value if isinstance(value, Decimal) else Decimal(repr(value))
    return number if number.is_finite() else None
