import pytest

from megatron_prime.verify.math_notation import UnreadableError, tokenize


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        (r"\left( 1,\, 2 \right)", ["(", "1", ",", "2", ")"]),
        (r"\dfrac{1}{2}", [r"\frac", "{", "1", "}", "{", "2", "}"]),
        ("1,234", ["1234"]),
        ("(1,234)", ["(", "1", ",", "234", ")"]),
        (r"\{1{,}234\}", [r"\{", "1234", r"\}"]),
        (r"1\,234\,567.5", ["1234567.5"]),
        (r"11,\! 111,\! 100", ["11111100"]),
        ("1,2345", ["1", ",", "2345"]),
        ("90^{\\circ}", ["90", "°"]),
        (r"\cotx", [r"\cot", "x"]),
        (r"5\text{ cm}^2", ["5", '"cm', "^", "2"]),
        (r"\textbf{(023) }", ["(", "023", ")"]),
        (r"2 \text{ and } 3", ["2", '"and', "3"]),
        ("no solution", ['"no', '"solution']),
        ("2x sin(y)", ["2", "x", r"\sin", "(", "y", ")"]),
        ("$5$.", ["5"]),
        (r"0.\overline{3}", ["0.(3)"]),
        ("0.1666...", ["0.166(6)"]),
        (r"3.14159\ldots", ["3.14159", r"\ldots"]),
        ("1−2", ["1", "-", "2"]),
        (r"\begin{pmatrix}1\\[4pt]2\end{pmatrix}",
         [r"\begin{pmatrix}", "1", "\\\\", "2", r"\end{pmatrix}"]),
        ("", []),
    ],
)  # fmt: skip
def test_notation_leaves_no_trace(text, tokens):
    assert list(tokenize(text)) == tokens


def test_a_list_of_numbers_of_three_digits_can_be_read_as_such():
    assert tokenize("100,200") == ("100200",)
    assert tokenize("100,200", thousands=False) == ("100", ",", "200")


@pytest.mark.parametrize("text", ["(" * 100, "{" * 100, r"\text{never closed"])
def test_what_nobody_writes_is_refused(text):
    with pytest.raises(UnreadableError):
        tokenize(text)
