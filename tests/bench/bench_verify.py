"""The verifiers in one run: programs per second, math checks per second, right and wrong by class.

    python tests/bench/bench_verify.py [--problems N] [--rounds N]

Prints the tables of verify_code.py and verify_math.py.
"""

from __future__ import annotations

import table
import verify_code
import verify_math

if __name__ == "__main__":
    table.row(*table.COLUMNS)
    table.row(*["---"] * len(table.COLUMNS))
    verify_code.main()
    print()
    verify_math.main()
