"""run_pretraining.py killed at random moments and started again: everything an undisturbed run gives."""

import pytest
import tiny_scripts
from forked_script import ForkedScript, assert_same_run

SHARE = 8  # of 20 trials


@pytest.fixture(scope="module")
def script(tiny_corpus, tmp_path_factory) -> ForkedScript:
    return tiny_scripts.pretraining(tiny_corpus, tmp_path_factory.mktemp("pretraining"))


def test_killed_and_started_again(script, trial, rng):
    assert_same_run(script.kill_until_finished(f"killed{trial}", rng), script.undisturbed())
