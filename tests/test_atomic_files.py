"""One writer at a time, and what killed writers leave."""

import subprocess
import sys

import pytest

from uc2.atomic_files import atomic_directory, atomic_file, remove_leftovers, sole_writer

HOLD = """
import sys, time
from uc2.atomic_files import sole_writer
with sole_writer(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_writer_is_refused_until_the_first_is_dead(tmp_path):
    output = tmp_path / "folder" / "out"
    with subprocess.Popen([sys.executable, "-c", HOLD, str(output)], stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(BlockingIOError, match="another run is writing .*out"), sole_writer(output):
            pass
        other.kill()
    with sole_writer(output), sole_writer(tmp_path / "folder" / "other"):
        pass
    assert not list(output.parent.iterdir())


def test_leftovers_of_killed_writers_are_removed(tmp_path):
    with atomic_file(tmp_path / "a.json") as temporary:
        temporary.write_text("1")
    with atomic_directory(tmp_path / "b") as temporary:
        (temporary / "file").touch()
    # What a kill leaves while "a.json" is written, and between the two renames that replace "b".
    (tmp_path / ".a.json.x1.tmp").touch()
    (tmp_path / ".b.x1.tmp").mkdir()
    (tmp_path / ".b.x2.old" / "b").mkdir(parents=True)
    remove_leftovers(tmp_path / "a.json")
    remove_leftovers(tmp_path / "b")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "b"]
