"""run_retrieval.py killed at random moments and started again: everything an undisturbed run gives."""

import pytest
import tiny_scripts
from forked_script import ForkedScript, assert_same_run, losses

SHARE = 6  # of 20 trials


@pytest.fixture(scope="module")
def script(tiny_corpus, tmp_path_factory) -> ForkedScript:
    return tiny_scripts.retrieval(tiny_corpus, tmp_path_factory.mktemp("retrieval"))


def test_killed_and_started_again(script, trial, rng):
    assert_same_run(script.kill_until_finished(f"killed{trial}", rng), script.undisturbed())


def test_loading_ahead_changes_nothing(script):
    """Batches that workers build before a mining, and after it, are trained on with the same negatives."""
    expected = losses(script.undisturbed())
    assert script.run("ahead", dataloader_num_workers=1) == 0
    assert losses(script.folder / "ahead") == expected
    assert script.run("unmined", hard_negatives=False) == 0
    unmined = losses(script.folder / "unmined")
    assert unmined[:8] == expected[:8] and unmined[8:] != expected[8:]
