"""SGLang's server as a child of the trainer: `python -m megatron_prime.rollout.sglang_main PID`.

Runs in the interpreter that has SGLang, which need not be the trainer's: this file and what it
imports use the standard library and SGLang only. The options come as JSON on standard input, under
the names of SGLang's `ServerArgs`, so that the API key is in no command line and in no file. The
server dies with the trainer, however that ends: this process by the kernel's death signal, and so
do SGLang's scheduler and detokenizer. They ask for it themselves, but seconds after they were
started; as they import this file first of all, they do it here.
"""

from __future__ import annotations

import difflib
import json
import os
import sys
from dataclasses import fields

from megatron_prime.runtime.parent import die_with

TESTED = "0.5.17"  # of SGLang


def main() -> None:
    """Read the options and serve until killed."""
    die_with(int(sys.argv[1]))
    options = json.load(sys.stdin)

    import sglang

    if sglang.__version__ != TESTED:  # in the log, beside what comes of it
        print(
            f"found SGLang {sglang.__version__}; this project is tested with {TESTED}", flush=True
        )
    from sglang.srt.plugins import load_plugins

    load_plugins()  # before ServerArgs, which checks what plugins may allow
    from sglang.launch_server import run_server
    from sglang.srt.server_args import ServerArgs
    from sglang.srt.utils import kill_process_tree

    known = [field.name for field in fields(ServerArgs)]
    for name in sorted(set(options) - set(known)):
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        sys.exit(f"[sglang] {name}: SGLang's ServerArgs has no such option{hint}")
    try:
        run_server(ServerArgs(**options))
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


if __name__ == "__main__":
    main()
elif __name__ == "__mp_main__":  # in a process that SGLang has spawned
    if os.getppid() == 1:
        sys.exit("the server is gone")
    die_with(os.getppid())
