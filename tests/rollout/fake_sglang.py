"""A server that speaks as SGLang does, without a model: for fast tests, and for faults on demand.

`spec(folder, **faults)` is for `SglangServer`, which starts this file instead of SGLang. Tokens are
a function of (seed, ids so far, weights), log-probs of the token. `test_fake_sglang.py` compares it
with what the real server answered. With a custom weight loader and the sizes of `parameters`, a
table for each rank, it has parameters of these sizes, and calls the loader as SGLang does. It
writes each sample that it is asked for into `asked.jsonl`. Faults, all off by default:

- `die_after`: the process exits as the n-th list of samples arrives;
- `hang_after`: from the n-th on, nothing is answered any more;
- `stop_after`: as the n-th arrives, the process stops as by SIGSTOP;
- `spoil`: the n-th answer is wrong by the n-th of these: `lengths`, `nan`, `version`, `count`,
  `stop`, or null;
- `die_in_update`: the process exits in the middle of the n-th update of the weights;
- `hang_in_update`: the last rank's process hangs in the middle of the n-th;
- `corrupt`: a value changes in memory after the n-th update has written it;
- `orphan`: it has a child that would outlive it;
- `token_s`: seconds per token; `start_s`: seconds until it is up; `exit_at_start`: a status;
- `starts`: only the first n processes have these faults.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import importlib.util
import json
import os
import pickle
import random
import signal
import stat
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from aiohttp import web

from megatron_prime.runtime.parent import die_with

if TYPE_CHECKING:
    from megatron_prime.rollout.sglang_arguments import ServerSpec

CONTEXT = 2048
KEY = "the-key-of-the-run"


@dataclass
class Fake:
    """The state of one server."""

    options: dict
    faults: dict
    version: str = "default"
    lists: int = 0  # calls that asked for samples and were answered
    arrived: int = 0  # such calls, answered or not
    weights: Weights | None = None
    prefixes: set = field(default_factory=set)
    aborted: set = field(default_factory=set)
    running: dict = field(default_factory=dict)  # rid: its tokens
    away: set = field(default_factory=set)  # tags of memory that was released
    started: float = field(default_factory=time.monotonic)

    def hangs(self) -> bool:
        return self.lists >= self.faults.get("hang_after", 1 << 30)

    async def generate(self, body: dict) -> list | dict:
        single = isinstance(body["rid"], str)
        params = body["sampling_params"]
        if single:
            answer = await self.sample(body["rid"], body["input_ids"], params)
            if not body.get("return_logprob"):
                del answer["meta_info"]["output_token_logprobs"]
            return answer
        cached = [self.known(ids) for ids in body["input_ids"]]  # they arrive together
        jobs = (
            self.sample(*job, known)
            for *job, known in zip(body["rid"], body["input_ids"], params, cached, strict=True)
        )
        answers = await asyncio.gather(*jobs)
        spoil(dict(enumerate(self.faults.get("spoil", ()))).get(self.lists), answers)
        self.lists += 1
        return answers

    def known(self, ids: list[int]) -> int:
        lengths = (n for n in range(len(ids) - 1, 0, -1) if tuple(ids[:n]) in self.prefixes)
        return next(lengths, 0)

    async def sample(self, rid: str, ids: list[int], params: dict, cached: int = -1) -> dict:
        cached = self.known(ids) if cached < 0 else cached
        self.prefixes.update(tuple(ids[:n]) for n in range(1, len(ids) + 1))
        tokens = self.running[rid] = []
        seed = "greedy" if params.get("temperature") == 0 else params.get("sampling_seed")
        reason = {"type": "length", "length": params["max_new_tokens"]}
        digest = self.weights.digest if self.weights else ""
        while len(tokens) < params["max_new_tokens"]:
            tokens.append(next_token(seed, [*ids, *tokens], digest))
            await asyncio.sleep(self.faults.get("token_s", 0))
            if rid in self.aborted:
                reason = {"type": "abort", "message": "Aborted"}
                break
            if len(tokens) < params["max_new_tokens"] and tokens[-1] in params["stop_token_ids"]:
                reason = {"type": "stop", "matched": tokens[-1]}
                break
        del self.running[rid]
        self.aborted.discard(rid)
        return {
            "output_ids": tokens,
            "meta_info": {
                "id": rid,
                "finish_reason": reason,
                "prompt_tokens": len(ids),
                "completion_tokens": len(tokens),
                "cached_tokens": cached,
                "weight_version": self.version,
                "output_token_logprobs": [[-0.25 * (1 + t % 7), t, None] for t in tokens],
            },
        }


def next_token(seed: int | str | None, ids: list[int], digest: str = "") -> int:
    return random.Random(f"{seed} {ids} {digest}").randrange(4, 64)


class Weights:
    """The parameters of all ranks, and the loader that SGLang would call in each rank's process."""

    def __init__(self, tables: list[dict[str, list[int]]], loader: str, faults: dict) -> None:
        import torch  # takes a second

        self.digest = ""
        self.updates = 0
        self.faults = faults
        self.models = []
        self.modules = []
        path = importlib.util.find_spec(loader.rpartition(".")[0]).origin
        for rank, table in enumerate(tables):
            model = torch.nn.Module()
            found = {
                name: torch.nn.Parameter(torch.full(size, 7.0)) for name, size in table.items()
            }
            model.named_parameters = lambda found=found: iter(found.items())
            self.models.append(model)
            # a module with its own memory for each rank, which have processes of their own
            spec = importlib.util.spec_from_file_location(f"loader_{rank}", path)
            self.modules.append(importlib.util.module_from_spec(spec))
            spec.loader.exec_module(self.modules[-1])

    async def load(self, payloads: list[str]) -> None:
        self.updates += 1
        if self.updates in (self.faults.get("die_in_update"), self.faults.get("corrupt")):
            self.spoil_checksums(dies=self.updates == self.faults.get("die_in_update"))
        if self.updates == self.faults.get("hang_in_update"):
            self.modules[-1].checksum = lambda values: time.sleep(3600)
        calls = (
            asyncio.to_thread(module.load, model, pickle.loads(base64.b64decode(payload)))
            for module, model, payload in zip(self.modules, self.models, payloads, strict=True)
        )
        await asyncio.gather(*calls)
        self.digest = digest_of([dict(model.named_parameters()) for model in self.models])

    def forget(self) -> None:
        """Released memory comes back with anything in it."""
        self.digest = "garbage"
        for model in self.models:
            for _, parameter in model.named_parameters():
                parameter.data.fill_(-99.0)

    def spoil_checksums(self, dies: bool) -> None:
        """The next call of the first rank's `checksum` meets the fault."""
        module, right = self.modules[0], self.modules[0].checksum

        def checksum(values):
            if dies:
                os._exit(9)
            module.checksum = right
            values.view(-1)[0] += 1
            return right(values)

        module.checksum = checksum


def digest_of(ranks: list[dict]) -> str:
    """Of the parameters of all ranks."""
    found = hashlib.sha256()
    for parameters in ranks:
        for name in sorted(parameters):
            found.update(name.encode() + parameters[name].detach().numpy().tobytes())
    return found.hexdigest()


def spoil(how: str | None, answers: list[dict]) -> None:
    first = answers[0]
    if how == "count":
        answers.pop()
    elif how == "lengths":
        first["meta_info"]["output_token_logprobs"].pop()
    elif how == "nan":
        first["meta_info"]["output_token_logprobs"][0][0] = None
    elif how == "version":
        first["meta_info"]["weight_version"] = "another"
    elif how == "stop":
        first["meta_info"]["finish_reason"] = {"type": "stop", "matched": first["output_ids"][-1]}


def application(fake: Fake) -> web.Application:
    key = fake.options["api_key"]

    @web.middleware
    async def guard(request, handler):
        if fake.hangs():
            await asyncio.sleep(3600)
        if request.path.startswith("/health"):
            return await handler(request)
        if request.headers.get("Authorization") != f"Bearer {key}":
            return web.json_response({"error": "Unauthorized"}, status=401)
        return await handler(request)

    async def health(request):
        up = time.monotonic() - fake.started > fake.faults.get("start_s", 0)
        return web.Response(status=200 if up else 503)

    async def generate(request):
        body = await request.json()
        batch = not isinstance(body["rid"], str)
        if fake.away:
            os._exit(1)
        if batch:
            fake.arrived += 1
            record(fake.faults, [{"rid": rid, "version": fake.version} for rid in body["rid"]])
        if batch and fake.arrived == fake.faults.get("die_after"):
            os._exit(9)
        if batch and fake.arrived == fake.faults.get("stop_after"):
            os.kill(os.getpid(), signal.SIGSTOP)
        prompts = body["input_ids"] if batch else [body["input_ids"]]
        if any(len(ids) >= CONTEXT for ids in prompts):
            return web.json_response({"error": {"message": "too long"}}, status=400)
        return web.json_response(await fake.generate(body))

    async def abort(request):
        body = await request.json()
        rids = fake.running if body.get("abort_all") else [body["rid"]]
        fake.aborted.update(r for r in fake.running for rid in rids if r.startswith(rid))
        return web.Response()

    async def update(request):
        body = await request.json()
        if len(body["serialized_named_tensors"]) != fake.options["tp_size"]:
            os._exit(1)
        if "weights" in fake.away:
            os._exit(1)
        while fake.running:  # as SGLang's writer lock does
            await asyncio.sleep(0.01)
        if fake.weights and body.get("load_format") in fake.options["custom_weight_loader"]:
            await fake.weights.load(body["serialized_named_tensors"])
        fake.version = body.get("weight_version") or fake.version
        if body.get("flush_cache", True):
            fake.prefixes.clear()
        return web.json_response({"success": True, "message": "Succeeded."})

    async def flush(request):
        if fake.running:
            return web.Response(status=400, text="Flush cache failed.\n")
        fake.prefixes.clear()
        return web.Response(text="Cache flushed.\n")

    async def release(request):
        tags = (await request.json())["tags"]
        if fake.running:  # an assertion in SGLang's scheduler
            os._exit(1)
        record(fake.faults, [{"release": sorted(tags)}])
        fake.away.update(tags)
        if "weights" in tags and fake.weights:
            fake.weights.forget()
        return web.Response()

    async def resume(request):
        tags = (await request.json())["tags"]
        record(fake.faults, [{"resume": sorted(tags)}])
        if not fake.away.issuperset(tags):  # a KeyError there
            os._exit(1)
        fake.away.difference_update(tags)
        return web.Response()

    async def info(request):
        return web.json_response(fake.options | {"internal_states": [{}]})

    app = web.Application(middlewares=[guard], client_max_size=1 << 30)
    app.add_routes(
        [
            web.get("/health", health),
            web.get("/health_generate", health),
            web.post("/generate", generate),
            web.post("/abort_request", abort),
            web.post("/update_weights_from_tensor", update),
            web.post("/flush_cache", flush),
            web.post("/release_memory_occupation", release),
            web.post("/resume_memory_occupation", resume),
            web.get("/server_info", info),
        ]
    )
    return app


def record(faults: dict, lines: list[dict]) -> None:
    with Path(faults["record"]).open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def asked(folder: Path) -> list[dict]:
    """The samples that the server of this folder was asked for, by all its processes."""
    return [line for line in recorded(folder / "asked.jsonl") if "rid" in line]


def recorded(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def spec(folder: Path, options: dict | None = None, tp: int = 1, **faults) -> ServerSpec:
    """Of a fake server with its folder; `python` is a program that runs this file."""
    from megatron_prime.rollout.sglang_arguments import ServerSpec  # heavy for the server itself

    folder.mkdir(parents=True, exist_ok=True)
    program = folder / "fake_python"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{__file__}" "$4"\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return ServerSpec(
        python=program,
        model_dir=folder / "model",
        tp=tp,
        devices=None,
        host="127.0.0.1",
        api_key=KEY,
        dtype="fp32",
        folder=folder,
        options={**(options or {}), "faults": faults | {"record": str(folder / "asked.jsonl")}},
        start_timeout_s=20.0,
    )


def main() -> None:
    """What `fake_python -P -m megatron_prime.rollout.sglang_main PID` runs."""
    die_with(int(sys.argv[1]))
    options = json.load(sys.stdin)
    faults, parameters = options.pop("faults"), options.pop("parameters", None)
    starts = sum("start" in line for line in recorded(Path(faults["record"])))
    record(faults, [{"start": os.getpid()}])
    if starts >= faults.get("starts", 1 << 30):
        faults = {"record": faults["record"]}
    if "exit_at_start" in faults:
        print(f"some error; {options['api_key']}", flush=True)
        sys.exit(faults["exit_at_start"])
    if "orphan" in faults:
        subprocess.Popen(["sleep", "60"])
    fake = Fake(options, faults)
    if parameters:
        (loader,) = options["custom_weight_loader"]
        fake.weights = Weights(parameters, loader, faults)
    app = application(fake)
    web.run_app(app, host=options["host"], port=options["port"], reuse_address=True, print=None)


if __name__ == "__main__":
    main()
