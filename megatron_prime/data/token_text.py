"""Which characters a token stands for.

Tokens are pieces of bytes, not of text: one may hold half a character, and some decoders put a
space before a word only if something precedes it. So a token's text is what the decoded text grows
by when it comes; a token that leaves a character unfinished has none, and the one that completes it
has the whole character. Decoding starts anew two tokens back, not at the beginning, so the time is
linear in the tokens. Special tokens, such as the one that ends a response, have no text.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_prime.data.steps import Decoder

_UNFINISHED = "\ufffd"
_LONGEST = 16  # tokens that one character may be spread over; more are no text at all


def pieces(token_ids: Sequence[int], decoder: Decoder) -> list[str]:
    """The text of each token; joined, that of all."""
    found = list[str]()
    start = read = 0  # the window decoded, and how far it has been given out
    for end in range(1, len(token_ids) + 1):
        before = decoder.decode(token_ids[start:read], skip_special_tokens=True)
        now = decoder.decode(token_ids[start:end], skip_special_tokens=True)
        if now.endswith(_UNFINISHED) and end < len(token_ids) and end - read < _LONGEST:
            found.append("")
            continue
        found.append(now[len(before) :])
        start, read = read, end
    return found
