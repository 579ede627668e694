"""Where the hub listens, by what its address means here."""

from __future__ import annotations

import socket

import pytest

from megatron_prime.runtime import hub


@pytest.mark.parametrize(
    ("address", "means", "several", "bound"),
    [
        ("127.0.0.1", "127.0.0.1", True, "127.0.0.1"),
        ("localhost", "127.0.0.1", True, "127.0.0.1"),
        ("gpu01", "127.0.1.1", True, ""),  # as in Debian's /etc/hosts
        ("gpu01", "127.0.1.1", False, "127.0.1.1"),
        ("gpu01", "10.0.0.1", True, "10.0.0.1"),
        ("10.0.0.1", "10.0.0.1", True, "10.0.0.1"),
    ],
)
def test_a_name_that_means_loopback_here_means_this_node_elsewhere(
    address: str, means: str, several: bool, bound: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    create = socket.create_server

    def listen(at: tuple[str, int], **keywords: object) -> socket.socket:
        asked.append(at[0])
        return create(("127.0.0.1", 0))

    answer = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (means, 0))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: answer)
    monkeypatch.setattr(socket, "create_server", listen)
    hub.listen_on(address, several).close()
    assert asked == [bound]
