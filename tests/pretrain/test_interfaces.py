import socket

import pytest

from pretrain import interfaces
from pretrain.interfaces import VARIABLE, listen_at

MINE = {"docker0": "172.17.0.1", "ib0": "10.1.0.7"}


@pytest.fixture
def named(monkeypatch):
    """Gives this machine's name an address; None: it has none."""
    monkeypatch.setattr(interfaces, "interfaces", lambda: MINE)

    def name(address: str | None) -> None:
        def resolve(host, port, **_):
            assert host == socket.gethostname()
            if address is None:
                raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            return [(family, socket.SOCK_STREAM, 6, "", (address, port or 0))]

        monkeypatch.setattr(socket, "getaddrinfo", resolve)

    return name


@pytest.mark.parametrize("address", ["127.0.1.1", "127.0.0.1", "::1", None])
def test_gloo_listens_where_the_nodes_have_met_if_its_own_name_leads_nowhere(named, address):
    named(address)
    environment: dict[str, str] = {}
    listen_at("10.1.0.7", environment)
    assert environment == {VARIABLE: "ib0"}


def test_what_works_or_was_chosen_is_left_alone(named):
    named("10.1.0.7")
    environment: dict[str, str] = {}
    listen_at("10.1.0.7", environment)
    assert environment == {}
    named("127.0.1.1")
    environment = {VARIABLE: "eth3"}
    listen_at("10.1.0.7", environment)
    assert environment == {VARIABLE: "eth3"}


@pytest.mark.parametrize("address", ["127.0.0.1", "10.1.0.8"])
def test_several_nodes_on_one_machine_and_addresses_of_no_interface_choose_none(named, address):
    named("127.0.1.1")
    environment: dict[str, str] = {}
    listen_at(address, environment)
    assert environment == {}


def test_the_interfaces_of_this_machine_are_without_the_loopback():
    found = interfaces.interfaces()
    assert "lo" not in found
    for address in found.values():
        socket.create_server((address, 0)).close()
