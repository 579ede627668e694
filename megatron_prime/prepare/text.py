r"""Two ways to look at a text: its normal form, for equality, and its words, for overlap.

The normal form forgets what changes the look and not the problem: white space, dollar signs, the
size of brackets, thin spaces, letter case. It keeps every operator, for 3-5 is not 3+5. The words
forget punctuation and operators as well, as is usual for overlap of n-grams; `\dfrac` and `\frac`
are the same word, and commands of mere layout are none.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata

_LAYOUT = re.compile(
    r"\\(?:left|right|big|Big|bigg|Bigg|displaystyle|textstyle|limits|qquad|quad)(?![A-Za-z])"
    r"|\\[,;:! ]|\$|\\[()\[\]]"
)
_FONT = re.compile(r"\\(?:text(?:bf|it|rm|sf|tt)?|math(?:bf|it|rm|sf|tt)|mbox)(?![A-Za-z])")
_FRACTION = re.compile(r"\\[dt]frac(?![A-Za-z])")
_SPACE = re.compile(r"\s+")
_WORD = re.compile(r"[^\W_]+")
_NUMBER = re.compile(r"\d+(?:\.\d+)?")


def normal_form(text: str) -> str:
    """The text without white space and layout, in small letters."""
    return _SPACE.sub("", _plain(text))


def words(text: str) -> list[str]:
    """Runs of letters and digits, in small letters."""
    return _WORD.findall(_plain(text))


def numbers(text: str) -> list[str]:
    """The numbers of a text, in order."""
    return _NUMBER.findall(text)


def digest(text: str) -> int:
    """A 64-bit key of a text, the same in every process and on every machine."""
    return int.from_bytes(hashlib.blake2b(text.encode(errors="replace"), digest_size=8).digest())


def shorten(text: str, limit: int = 160) -> str:
    """On one line, with a limit."""
    line = _SPACE.sub(" ", text).strip()
    return line if len(line) <= limit else line[: limit - 1] + "…"


def _plain(text: str) -> str:
    text = unicodedata.normalize("NFKC", text)
    text = _FRACTION.sub(r"\\frac", _FONT.sub(" ", _LAYOUT.sub(" ", text)))
    return text.casefold()
