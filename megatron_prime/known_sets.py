"""The seven sets of the paper's Tables 2 and 3: what a file of each looks like; without torch.

None is shipped: their licences differ, and some are not ours to copy. So each entry says where the
file is found and in which form it is read, and an error about a missing file repeats that.
Sampling, prompts and limits are those of the paper's evaluation scripts (docs/evaluation.md).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class KnownSet:
    """A set that the paper has numbers for."""

    title: str  # as the paper's tables name it
    ability: str
    problems: int
    max_tokens: int  # of a response
    source: str
    example: str  # a line of the file
    only_url: str = ""  # rows with a `url` count if that contains this
    since: str = ""  # rows with a `contest_date` count from this day …
    until: str = ""  # … to this one
    integers: bool = False  # answers are whole numbers, whatever the file writes ("142.0")


_CODE = (
    '{"id": "1", "problem": "…", "tests": {"inputs": ["2 3\\n"], "outputs": ["5\\n"]}}, or with '
    '"fn_name": "add" in tests and arguments as inputs: [[2, 3]], [5]'
)

KNOWN_SETS = {
    "aime2024": KnownSet(
        title="AIME 2024",
        ability="math",
        problems=30,
        max_tokens=4096,
        source="AI-MO/aimo-validation-aime on Hugging Face as jsonl; of its 90 rows those with "
        "2024_AIME in their url are taken",
        example='{"id": "0", "problem": "…", "answer": "204", "url": "…/2024_AIME_I_Problems/…"}',
        only_url="2024_AIME",
        integers=True,
    ),
    "amc": KnownSet(
        title="AMC",
        ability="math",
        problems=83,
        max_tokens=4096,
        source="AI-MO/aimo-validation-amc on Hugging Face as jsonl",
        example='{"id": "0", "problem": "…", "answer": "142.0"}',
        integers=True,
    ),
    "math500": KnownSet(
        title="MATH-500",
        ability="math",
        problems=500,
        max_tokens=8192,
        source="HuggingFaceH4/MATH-500 on Hugging Face (test.jsonl)",
        example='{"unique_id": "test/…", "problem": "…", "answer": "\\\\frac{1}{2}"}',
    ),
    "minerva": KnownSet(
        title="Minerva Math",
        ability="math",
        problems=272,
        max_tokens=4096,
        source="evaluation/data/minerva_math/test.jsonl of the repository QwenLM/Qwen2.5-Math",
        example='{"idx": 0, "problem": "…", "solution": "… \\\\boxed{2.7778e6}"}',
    ),
    "olympiadbench": KnownSet(
        title="OlympiadBench",
        ability="math",
        problems=675,
        max_tokens=4096,
        source="evaluation/data/olympiadbench/test.jsonl of the repository QwenLM/Qwen2.5-Math "
        "(open-ended, English, text only)",
        example='{"id": 1606, "question": "…", "final_answer": ["$2$"]}',
    ),
    "leetcode": KnownSet(
        title="LeetCode",
        ability="code",
        problems=180,
        max_tokens=8192,
        source="the 180 weekly-contest problems of the repository deepseek-ai/DeepSeek-Coder "
        "(Evaluation/LeetCode), their asserts rewritten as tests",
        example=_CODE,
    ),
    "livecodebench": KnownSet(
        title="LiveCodeBench",
        ability="code",
        problems=511,
        max_tokens=4096,
        source="livecodebench/code_generation_lite on Hugging Face, public and private tests "
        "written out; of rows with a contest_date those of 2023-05-01 to 2024-05-31 (v2) count",
        example=_CODE,
        since="2023-05-01",
        until="2024-05-31",
    ),
}


def how_to_bring(name: str) -> str:
    """Which file a set wants, for an error about one that is missing or of another form."""
    known = KNOWN_SETS.get(name)
    if known is None:
        return (
            'wanted jsonl or parquet with a line like {"id": "1", "problem": "…", "answer": "4"} '
            f"for each problem, or {_CODE}, or the fields of Eurus-2-RL-Data"
        )
    return (
        f"{known.title} is not shipped; bring {known.source}; a line for each of its "
        f"{known.problems} problems, like {known.example}"
    )


def max_tokens_of(name: str, given: int | None, otherwise: int) -> int:
    """The longest response: `given`, the known set's own limit, or `otherwise`."""
    known = KNOWN_SETS.get(name)
    return given or (known.max_tokens if known else otherwise)
