"""The network interfaces of this machine, and the one where gloo must listen for other machines.

gloo listens at the address that this machine's own name has. Debian writes that into /etc/hosts as
127.0.1.1, and other names do not resolve: then it listens where only this machine can come, as if
nothing were wrong, unless GLOO_SOCKET_IFNAME names an interface. (torch/csrc/distributed/c10d/
ProcessGroupGloo.cpp, createDefaultDevice.) NCCL looks for interfaces itself, and leaves the loopback out.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from collections.abc import MutableMapping
from contextlib import suppress

VARIABLE = "GLOO_SOCKET_IFNAME"
_SIOCGIFADDR = 0x8915


def interfaces() -> dict[str, str]:
    """Name to IPv4 address, those of the loopback left out."""
    found: dict[str, str] = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # an interface without an address
                asked = struct.pack("256s", name.encode()[:15])
                answer = fcntl.ioctl(any_socket.fileno(), _SIOCGIFADDR, asked)
                found[name] = socket.inet_ntoa(answer[20:24])
    return {name: address for name, address in found.items() if not address.startswith("127.")}


def listen_at(address: str, environment: MutableMapping[str, str] = os.environ) -> None:
    """Have gloo listen at an address of this machine, where by itself it would at the loopback.

    Args:
        address: over which the other machines and this one have met.
        environment: gets the name of its interface, if it names none yet.
    """
    names = [name for name, one in interfaces().items() if one == address]
    if names and VARIABLE not in environment and not _is_found():
        environment[VARIABLE] = names[0]


def _is_found() -> bool:
    """Whether the name of this machine is an address at which others may find it."""
    try:
        found = socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM)
    except OSError:
        return False
    # The first is the one that is taken.
    return not str(found[0][4][0]).startswith(("127.", "::1"))
