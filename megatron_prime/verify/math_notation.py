r"""From what people type to tokens: everything that is notation and not content is gone afterwards.

A token is a string: a number (`12`, `0.5`, `0.1(6)` for a repeating decimal), a letter, a command
(`\frac`), a sign, or words, which begin with a quote (`"cm`). Spaces, sizes of brackets, fonts,
`$…$`, thousands separators and Unicode's spellings of signs leave no trace; several spellings of a
command become one (`\dfrac`, `\tfrac` and `\frac`).

A comma between digits is a thousands separator where the groups have three digits and no bracket
is open: `1,234` is a number, `(1,234)` a pair. `thousands=False` reads the former as two numbers.
"""

from __future__ import annotations

import re
from collections.abc import Collection

MAX_DEPTH = 40  # of braces and brackets; answers of the data stay below ten

Tokens = tuple[str, ...]


class UnreadableError(ValueError):
    """Not an answer that we know how to read."""


def words(text: str) -> frozenset[str]:
    """The words of a text."""
    return frozenset(text.split())


_UNICODE = {
    **dict.fromkeys("−–—‐‑", "-"),
    **dict.fromkeys("×·∙⋅∗", "*"),
    **dict.fromkeys("\u00a0\u2009\u202f\u200a\u2003\u2002", " "),
    **{"“": '"', "”": '"', "‘": "'", "’": "'", "′": "'", "÷": "/", "∕": "/", "⁄": "/"},
    **{"≤": r"\leq ", "⩽": r"\leq ", "≥": r"\geq ", "⩾": r"\geq ", "≠": r"\neq "},
    **{"∞": r"\infty ", "√": r"\sqrt ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in "},
    **{"±": r"\pm ", "∓": r"\mp ", "∅": r"\emptyset ", "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}"},
    **{"π": r"\pi ", "θ": r"\theta ", "α": r"\alpha ", "β": r"\beta ", "…": r"\ldots "},
    **{"≈": r"\approx ", "∖": r"\setminus ", "⟨": r"\langle ", "⟩": r"\rangle ", "∠": r"\angle "},
    **{"½": r"\frac{1}{2}", "⅓": r"\frac{1}{3}", "⅔": r"\frac{2}{3}", "¼": r"\frac{1}{4}"},
    **{"¾": r"\frac{3}{4}", "º": "°", "％": "%", "，": ",", "（": "(", "）": ")"},
    **{power: f"^{digit}" for digit, power in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")},
}
_TO_LATEX = str.maketrans(_UNICODE)

_NOTHING = {
    *words(r"\displaystyle \textstyle \scriptstyle \left \right \middle \limits \nolimits \quad"),
    *words(r"\qquad \hfill \rm \bf \it \sf \tt \thinspace \enspace \mathstrut"),
    *words(r"\, \; \: \! \> \/"),
    *(rf"\{size}{side}" for size in ("big", "Big", "bigg", "Bigg") for side in ("", "l", "r", "m")),
    "\\ ",
    *words(r"\mathbf \mathit \mathsf \mathcal \boldsymbol \bm \pmb \boxed \vec \overrightarrow"),
    *words(r"\hat \widehat \mathop \mathscr \ensuremath \underline \mathopen \mathclose"),
}
_SAME = {
    **dict.fromkeys([r"\dfrac", r"\tfrac", r"\cfrac"], r"\frac"),
    **dict.fromkeys([r"\dbinom", r"\tbinom"], r"\binom"),
    **dict.fromkeys([r"\le", r"\leqslant", r"\leqq"], r"\leq"),
    **dict.fromkeys([r"\ge", r"\geqslant", r"\geqq"], r"\geq"),
    **dict.fromkeys([r"\cdot", r"\times", r"\ast", r"\bullet"], "*"),
    **dict.fromkeys([r"\vert", r"\lvert", r"\rvert", r"\mid"], "|"),
    **dict.fromkeys([r"\dots", r"\cdots", r"\dotsc", r"\dotsb"], r"\ldots"),
    **dict.fromkeys([r"\wedge", r"\land"], '"and'),
    **dict.fromkeys([r"\vee", r"\lor"], '"or'),
    **{r"\lt": "<", r"\gt": ">", r"\ne": r"\neq", r"\div": "/", r"\colon": ":", r"\%": "%"},
    **{r"\lbrace": r"\{", r"\rbrace": r"\}", r"\lbrack": "[", r"\rbrack": "]", r"\&": '"and'},
    **{r"\varnothing": r"\emptyset", r"\degree": "°", r"\backslash": r"\setminus", r"\#": "#"},
    **{r"\lparen": "(", r"\rparen": ")", r"\infin": r"\infty", r"\simeq": r"\approx"},
    **{r"\thickapprox": r"\approx", r"\tg": r"\tan", r"\ctg": r"\cot", r"\prime": "'"},
    **{r"\qty": "", r"\lg": r"\log", r"\_": "_", r"\R": r"\mathbb{R}", r"\euro": "€"},
}
_WORDS = "text textbf textit textrm textsf texttt textnormal mbox hbox mathrm operatorname emph"
_TEXT = re.compile(rf"\\(?:{'|'.join(_WORDS.split())})\*?\s*\{{")
FUNCTIONS = words("sin cos tan cot sec csc arcsin arccos arctan arccot sinh cosh tanh ln log exp")
_GREEK = words(
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi pi rho sigma tau"
    " upsilon phi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega"
)
# Commands that may be followed by a letter without a space, once somebody has removed the spaces.
_PREFIXES = sorted((*FUNCTIONS, *_GREEK, "cdot", "times", "pm", "infty"), key=len, reverse=True)
_SHORT_WORDS = words(
    "and or cm km mm kg mg ml mL hr hrs min sec ft lb lbs oz mph yd yds sq units unit yes no odd"
    " not the per day days inch feet foot mile one two six ten pm am PM AM"
)
_NAMES = {**{name: f"\\{name}" for name in (*FUNCTIONS, "pi", "sqrt", "theta", "infty")}}
_NAMES |= {"infinity": r"\infty", "asin": r"\arcsin", "acos": r"\arccos", "atan": r"\arctan"}

_SEPARATOR = r"(?:\{,\}|\\!,\\!|,\\!|\\!,|\\,|\\;|\\:|\\ |~| )"
_GROUPS = re.compile(rf"(?<![\d.])\d{{1,3}}(?:{_SEPARATOR}\s*\d{{3}})+(?!\d)")
_COMMAS = re.compile(r"\d{1,3}(?:,\d{3})+(?![\d])(?!,\d)(?:\.\d+)?")
_REPEATING = re.compile(r"(\d*\.\d*)\\(?:overline|bar|dot)\s*(?:\{\s*(\d+)\s*\}|(\d))")
_AND_SO_ON = re.compile(r"(\d*\.\d+)\s*(?:\\(?:ldots|dots|cdots|dotsc)\b|\.\.\.)")
_INVISIBLE = re.compile(
    r"\\(?:left|right)\s*\.|\\h?phantom\{[^{}]*\}|\\[hv]space\*?\{[^{}]*\}"
    r"|\\(?:text)?color\s*\{[A-Za-z]*\}"
)
_ENDING = re.compile(r"(?:\\[,;:! ]|(?<!\\)[\s.,;~])*\Z")
_DEGREE = re.compile(r"\^\s*(?:\\circ|\{\s*\\circ\s*\})")
_TOKEN = re.compile(
    r"(?P<number>\d+\.?\d*(?:[eE][+-]?\d+(?!\w))?|\.\d+)|(?P<command>\\(?:[A-Za-z]+|.))"
    r"|(?P<letters>[A-Za-z]+)|(?P<sign>\S)",
    re.DOTALL,
)
_JOINING = re.compile(r"\b(and|or)\b|[,&]")


def tokenize(text: str, thousands: bool = True) -> Tokens:
    r"""The tokens of an answer; UnreadableError if its brackets are nested too deeply."""
    text = re.sub(r"\\\\\s*\[[^\]]*\]", r"\\\\ ", text)  # the distance between two rows
    text = re.sub(r"(?<!\\)(?:\\[\[\]()]|\$)", " ", text).translate(_TO_LATEX).strip()
    text = _INVISIBLE.sub("", text)
    text = re.sub(r"\{\s*:\s*\}", ":", text)
    text = _DEGREE.sub("°", text)
    text = _GROUPS.sub(lambda match: re.sub(r"\D", "", match[0]), text)
    text = _REPEATING.sub(lambda match: f"{match[1] or '0.'}\x00{match[2] or match[3]}\x01", text)
    text = _AND_SO_ON.sub(_periodic, text)
    text = re.sub(r"(\d*\.\d*)\x00(\d+)\x01", r"\\repeating{\1,\2}", text)
    return tuple(_tokens(_ENDING.sub("", text), thousands, 0))


def _periodic(match: re.Match[str]) -> str:
    """0.333… and 0.1666… with their period; other decimals that go on stay unreadable."""
    whole, digits = match[1].split(".")
    for length in range(1, 1 + len(digits) // 2):
        copies = 3 if length == 1 else 2
        period = digits[-length:]
        if digits.endswith(period * copies):
            return f"{whole or '0'}.{digits[:-length]}\x00{period}\x01"
    return match[0]


def _tokens(text: str, thousands: bool, depth: int, brackets: int = 0) -> list[str]:
    """`depth` braces and brackets are open already, `brackets` of them brackets."""
    found: list[str] = []
    place = counted = 0
    while place < len(text):
        if depth > MAX_DEPTH:
            raise UnreadableError("nested too deeply")
        written = _TEXT.match(text, place)
        grouped = _COMMAS.match(text, place) if thousands and not brackets else None
        token = _TOKEN.match(text, place)
        if written:
            place = closing(text, written.end())
            found += _words(text[written.end() : place - 1], thousands, depth, brackets)
        elif grouped and not (found and found[-1] == ","):
            found.append(grouped[0].replace(",", ""))
            place = grouped.end()
        elif token is None:
            place += 1  # a space
        else:
            place = token.end()
            if token["command"] == r"\repeating":
                place = closing(text, place + 1)
                digits, period = text[token.end() + 1 : place - 1].split(",")
                found.append(f"{digits}({period})")
            elif token["command"] in (r"\begin", r"\end"):
                place = closing(text, place + 1)
                found.append(text[token.start() : place].replace(" ", "").replace("*", ""))
            else:
                found += _spelled(token)
        for new in found[counted:]:
            step = (new in OPENING) - (new in CLOSING)
            depth += step
            brackets += step if new not in "{}" else 0
        depth, brackets, counted = max(depth, 0), max(brackets, 0), len(found)
    return found


def closing(text: str, place: int) -> int:
    """Behind the brace that closes the one before `place`."""
    depth = 1
    while place < len(text):
        if text[place] == "\\":
            place += 1
        elif text[place] in "{}":
            depth += 1 if text[place] == "{" else -1
            if depth == 0:
                return place + 1
        place += 1
    raise UnreadableError("a brace is not closed")


def _words(content: str, thousands: bool, depth: int, brackets: int) -> list[str]:
    r"""What stands in `\text{…}`: mathematics if it has digits or no letters, else words."""
    content = content.replace(r"\ ", " ").replace("~", " ").strip()
    if re.search(r"[\d\\$]", content) or not re.search("[A-Za-z]", content):
        content = content.replace("$", " ")
        return _tokens(content, thousands, depth + 1, brackets) if content else []
    found: list[str] = []
    start = 0
    for joining in _JOINING.finditer(content):
        found.append('"' + content[start : joining.start()].strip())
        found += [","] if joining[0] == "," else ['"and' if joining[0] == "&" else '"' + joining[0]]
        start = joining.end()
    found.append('"' + content[start:].strip())
    return [word for word in found if word != '"']


def _spelled(token: re.Match[str]) -> list[str]:
    command, letters = token["command"], token["letters"]
    if command:
        if command in _NOTHING:
            return []
        name = _SAME.get(command, command)
        for prefix in _PREFIXES if len(command) > 3 and name not in ALONE else ():
            if command[1:].startswith(prefix) and 0 < len(command) - 1 - len(prefix) <= 2:
                return [f"\\{prefix}", *command[1 + len(prefix) :]]
        return [name] if name else []
    if letters:
        if letters in _NAMES:
            return [_NAMES[letters]]
        is_word = len(letters) > 3 or letters in _SHORT_WORDS
        return ['"' + letters] if is_word else list(letters)
    if token["number"]:
        return [token["number"].rstrip(".")]
    return [] if token["sign"] in "~`" else [token["sign"]]


OPENING = frozenset(["(", "[", "{", r"\{", r"\langle", r"\lfloor", r"\lceil"])
CLOSING = frozenset([")", "]", "}", r"\}", r"\rangle", r"\rfloor", r"\rceil"])
ALONE = words(
    r"\sinh \cosh \tanh \arcsin \arccos \arctan \arccot \cosec \epsilon \eta \int \infty \inf"
    r" \times \pmod \pi \Pi \psi \phi \xi \Xi \Psi \Phi \zeta \beta \theta \iota \in \notin \mu \nu"
    r" \exp \log \ln \tau \rho \chi \cdot \piv \prod \min \max \limsup \lim \sup \pm"
)


def closes(tokens: Tokens) -> int:
    """Where the bracket that opens first is closed; -1 if nowhere."""
    depth = 0
    for place, token in enumerate(tokens):
        depth += (token in OPENING) - (token in CLOSING)
        if depth == 0:
            return place
    return -1


def split(tokens: Tokens, separators: Collection[str]) -> tuple[list[Tokens], list[str]]:
    """The parts between separators outside all brackets, and the separators."""
    parts: list[Tokens] = []
    found: list[str] = []
    depth = start = 0
    for place, token in enumerate(tokens):
        depth += token in OPENING or token.startswith(r"\begin")
        depth -= token in CLOSING or token.startswith(r"\end")
        if depth <= 0 and token in separators:
            parts.append(tokens[start:place])
            found.append(token)
            start = place + 1
    return [*parts, tokens[start:]], found
