"""Record tests/rollout/sglang_exchanges.json: a conversation with the server of SGLANG_PYTHON.

    SGLANG_PYTHON=.venv-sglang/bin/python python tests/sglang/record_exchanges.py

What the fake server is checked against; look at the difference before it is committed.
"""

import asyncio
import json
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "rollout"), str(HERE.parents[1])]

import exchanges  # noqa: E402
import tiny_server  # noqa: E402

from megatron_prime.rollout.sglang_server import SglangServer  # noqa: E402


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        model = tiny_server.tiny_model(Path(name))
        server = SglangServer(tiny_server.spec_of(Path(name) / "engine", Path(name)))
        try:
            server.start()
            server.ready()
            weights = tiny_server.send_weights(server.url, model, tp=1, version="default")
            asyncio.run(weights)
            found = asyncio.run(exchanges.converse(server.url, tiny_server.KEY))
        finally:
            server.kill()
    exchanges.RECORDED.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
