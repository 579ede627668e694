"""All checks, in the order in which a reader would ask; refusals come first in the end."""

from __future__ import annotations

from megatron_prime.preflight import checks_network, checks_node, checks_same
from megatron_prime.preflight.findings import Findings, Problem, merged

CHECKS = (
    checks_network.presence_problems,
    checks_node.probe_problems,
    checks_same.version_problems,
    checks_same.source_problems,
    checks_same.gpu_kinds,
    checks_node.gpu_problems,
    checks_node.memory_problems,
    checks_node.disk_problems,
    checks_node.limit_problems,
    checks_network.folder_problems,
    checks_network.clock_problems,
    checks_network.reduce_problems,
)


def problems_of(found: Findings) -> list[Problem]:
    """Whatever is wrong, each with who has it."""
    return merged(problem for check in CHECKS for problem in check(found))
