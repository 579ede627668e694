"""A server that answers as SGLang does, from answers it has made beforehand: for rank0_step.py.

    python tests/bench/rank0_server.py TOKENS.json RESPONSE LONGEST

prints its port. Samples are RESPONSE tokens long on average, as the planner draws lengths, and
LONGEST at most, with log-probs as SGLang writes them: doubles that hold a single's value. It stands
in a process of its own, so that what it takes is not the client's.
"""

from __future__ import annotations

import json
import random
import socket
import struct
import sys
from pathlib import Path

from aiohttp import web

from megatron_prime.planner.lengths import response_lengths

SAMPLES = 256  # different ones
SPREAD = 0.6  # of their lengths' logarithm; the planner's default


def samples(tokens: list[int], mean: int, longest: int) -> list[tuple[bytes, bytes]]:
    """Answers to one request, before and behind its id."""
    found = []
    generator = random.Random(1)
    for number, response in enumerate(response_lengths(SAMPLES, mean, SPREAD, longest)):
        start = generator.randrange(len(tokens) - response)
        ids = tokens[start : start + response]
        logprobs = [single(-generator.expovariate(3.0)) for _ in ids]
        meta = {
            "id": "THE ID",
            "finish_reason": {"type": "length", "length": response},
            "prompt_tokens": 1024,
            "weight_version": "0",
            "num_retractions": 0,
            "input_token_logprobs": [],
            "output_token_logprobs": [[p, t, None] for p, t in zip(logprobs, ids, strict=True)],
            "output_token_logprobs_length": response,
            "reasoning_tokens": 0,
            "completion_tokens": response,
            "cached_tokens": 1023,
            "cached_tokens_details": {"device": 1023, "host": 0},
            "dp_rank": None,
            "e2e_latency": 12.5 + number,
            "response_sent_to_client_ts": 1.7e9,
        }
        answer = json.dumps({"output_ids": ids, "meta_info": meta}, separators=(",", ":"))
        before, behind = answer.encode().split(b'"THE ID"')
        found.append((before, behind))
    return found


def single(value: float) -> float:
    """To the nearest number of single precision."""
    return float(struct.unpack("f", struct.pack("f", value))[0])


def main(tokens: Path, mean: int, longest: int) -> None:
    made = samples(json.loads(tokens.read_text()), mean, longest)
    turn = 0

    async def generate(request: web.Request) -> web.Response:
        nonlocal turn
        body = await request.json()
        rids = body["rid"]
        if isinstance(rids, str):  # a prompt that is sent ahead
            return web.json_response({"output_ids": [], "meta_info": {"id": rids}})
        parts = []
        for rid in rids:
            before, behind = made[turn % SAMPLES]
            turn += 1
            parts.append(before + json.dumps(rid).encode() + behind)
        content = b"[" + b",".join(parts) + b"]"
        return web.Response(body=content, content_type="application/json")

    async def health(_: web.Request) -> web.Response:
        return web.Response()

    app = web.Application(client_max_size=1 << 30)
    app.add_routes([web.post("/generate", generate), web.get("/health_generate", health)])
    listener = socket.create_server(("127.0.0.1", 0))
    print(listener.getsockname()[1], flush=True)
    web.run_app(app, sock=listener, print=None)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
