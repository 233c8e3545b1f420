"""What the fault tests share: their number of trials, and scripts that run in forked processes."""

import random

import pytest


def pytest_addoption(parser):
    parser.addoption("--trials", type=int, default=20, help="kill trials, over all scripts")


@pytest.fixture
def rng(request) -> random.Random:
    """Random moments, the same in every session for a test and a number of trials."""
    return random.Random(request.node.nodeid)


def pytest_generate_tests(metafunc):
    """`trial` counts through a script's share of the trials."""
    if "trial" in metafunc.fixturenames:
        trials = metafunc.config.getoption("trials", 20)
        metafunc.parametrize("trial", range(-(-trials * metafunc.module.SHARE // 20)))
