"""Before the first step: can these nodes run this run? A table, and a refusal with its reasons.

Every rank says what it finds (`probes.py` makes the facts of `facts.py`), over a store that needs
neither gloo nor NCCL (`exchange.py`): those are among what is tested (`collectives.py`). Rank 0
compares the facts with each other and with what the run needs (`needs.py`, from the planner), finds
problems (`checks.py`, pure functions) and prints (`table.py`). Whatever hangs, the whole ends in
time and says who did not answer (`door.py`).
"""
