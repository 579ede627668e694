"""One conversation with a server, real or fake: what is answered to each call that we make.

`python tests/rollout/exchanges.py URL KEY` prints it as JSON; `sglang_exchanges.json` is that of
the real SGLang 0.5.17 on a CPU, and `tests/sglang/` checks that it still is. Values that depend on
a model become facts that don't: lengths, reasons, whether a seed gives the same tokens again.
"""

from __future__ import annotations

import asyncio
import base64
import json
import pickle
import sys
from collections.abc import Iterable
from pathlib import Path

import aiohttp

RECORDED = Path(__file__).with_name("sglang_exchanges.json")
PROMPT = [4 + (7 * i) % 50 for i in range(40)]


async def converse(url: str, key: str) -> dict[str, dict]:
    """The answers by the names of the calls."""
    found: dict[str, dict] = {}
    async with aiohttp.ClientSession() as session:

        async def call(name, method, path, body=None, with_key=key):
            headers = {"Authorization": f"Bearer {with_key}"} if with_key else {}
            async with session.request(method, url + path, json=body, headers=headers) as answer:
                is_json = answer.content_type == "application/json"
                value = await answer.json() if is_json else await answer.text()
                found[name] = {"status": answer.status, "json": is_json}
                if answer.status == 200:
                    found[name]["shape"] = shape_of(value)
            return value

        def facts(name, samples):
            found[name]["facts"] = [fact_of(sample) for sample in samples]

        await call("health", "GET", "/health", with_key=None)
        await call("no key", "POST", "/generate", sampling(["a"]), with_key=None)
        await call("wrong key", "POST", "/abort_request", {"abort_all": True}, with_key="other")
        ahead = {"rid": "ahead;", "input_ids": PROMPT, "sampling_params": {"max_new_tokens": 0}}
        facts("prompt ahead", [await call("prompt ahead", "POST", "/generate", ahead)])
        group = await call("group", "POST", "/generate", sampling("bcd"))
        facts("group", group)
        again = await call("one again", "POST", "/generate", sampling("c"))
        found["one again"]["same"] = again[0]["output_ids"] == group[1]["output_ids"]
        stop = group[0]["output_ids"][3]
        stopped = await call("stop", "POST", "/generate", sampling("b", stops=[stop]))
        at = group[0]["output_ids"].index(stop)
        found["stop"]["same"] = stopped[0]["output_ids"] == group[0]["output_ids"][: at + 1]
        found["stop"]["reason"] = stopped[0]["meta_info"]["finish_reason"]["type"]
        greedy = [  # no sample is compared after this: see PassRunner.run
            await call("greedy", "POST", "/generate", sampling(seeds, temperature=0.0))
            for seeds in ("e", "f")
        ]
        found["greedy"]["same"] = greedy[0][0]["output_ids"] == greedy[1][0]["output_ids"]
        long = asyncio.create_task(call("long", "POST", "/generate", sampling("gh", tokens=1900)))
        await asyncio.sleep(0.5)  # they arrive first, and on a busy machine, too, …
        await call("one beside", "POST", "/generate", sampling("j"))  # … are under way after this
        await call("flush while busy", "POST", "/flush_cache", {})
        await call("abort", "POST", "/abort_request", {"rid": "g;"})
        await call("abort all", "POST", "/abort_request", {"abort_all": True})
        samples = await long
        found["long"]["reasons"] = [s["meta_info"]["finish_reason"]["type"] for s in samples]
        found["long"]["cut"] = [0 < len(s["output_ids"]) < 1900 for s in samples]
        found["long"]["agree"] = [agree(sample) for sample in samples]
        await call("abort unknown", "POST", "/abort_request", {"rid": "nobody;"})
        await call("flush", "POST", "/flush_cache", {})
        payload = base64.b64encode(pickle.dumps([])).decode()
        weights = {"serialized_named_tensors": [payload], "weight_version": "7"}
        answer = await call("update", "POST", "/update_weights_from_tensor", weights)
        found["update"]["success"] = answer["success"]
        facts("after update", await call("after update", "POST", "/generate", sampling("b")))
        endless = sampling("i") | {"input_ids": [[5] * 2048]}
        await call("too long", "POST", "/generate", endless)
        await call("health of the scheduler", "GET", "/health_generate")
        info = await call("server_info", "GET", "/server_info")
        found["server_info"]["shape"] = shape_of({"tp_size": info["tp_size"]})
    return found


def sampling(rids: Iterable[str], temperature=1.0, tokens=8, stops=()) -> dict:
    """The body of a /generate call; the seed is the rid's letter."""
    params = {"temperature": temperature, "max_new_tokens": tokens, "stop_token_ids": list(stops)}
    return {
        "rid": [f"{rid};" for rid in rids],
        "input_ids": [PROMPT for _ in rids],
        "sampling_params": [{**params, "sampling_seed": ord(rid)} for rid in rids],
        "return_logprob": True,
    }


def fact_of(sample: dict) -> dict:
    meta = sample["meta_info"]
    return {
        "id": meta["id"],
        "tokens": len(sample["output_ids"]),
        "finish_reason": meta["finish_reason"],
        "cached_tokens": meta["cached_tokens"],
        "weight_version": meta["weight_version"],
        "agree": agree(sample),
    }


def agree(sample: dict) -> bool:
    """Whether the tokens stand beside the log-probs as they are."""
    triples = sample["meta_info"].get("output_token_logprobs", [])
    return [token for _, token, _ in triples] == sample["output_ids"]


def shape_of(value: object) -> object:
    """Types instead of values; of a list its first element."""
    if isinstance(value, dict):
        return {key: shape_of(item) for key, item in value.items()}
    if isinstance(value, list):
        return [shape_of(value[0])] if value else []
    return type(value).__name__


if __name__ == "__main__":
    print(json.dumps(asyncio.run(converse(*sys.argv[1:3])), indent=1))
