"""A Slurm for the whole session. Where none can be started its tests skip; under CI they fail instead."""

import os

import pytest

from slurm import testing


@pytest.fixture(scope="session")
def cluster():
    reason = testing.missing()
    if reason is not None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"needs a real Slurm: {reason}")
    with testing.Cluster(nodes=2) as cluster:
        yield cluster
