"""Commands over shards: the same files as one call per shard, with and without Ray."""

import json
import shlex

import pytest

from uc2 import sharding, translation


@pytest.fixture
def shards(tmp_path) -> list[str]:
    """Three shards of captions and, for each, German translations in the rows already: no model is needed."""
    files = []
    for shard in range(3):
        path = tmp_path / f"part-{shard}.jsonl"
        rows = [
            {"image_id": f"{shard}-{n}", "captions": {"en": f"Dog {n}.", "de": f"Hund {n}."}}
            for n in range(4)
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        files.append(str(path))
    return files


ARGUMENTS = ["--languages", "de", "--model", "never-loaded"]


def test_tasks_are_calls_of_the_command(shards, tmp_path):
    tasks = sharding.shard_tasks("translate", shards, str(tmp_path / "out"), ARGUMENTS)
    assert [task["output"] for task in tasks] == [str(tmp_path / f"out/part-{n}.jsonl") for n in range(3)]
    expected = ["--input", shards[0], "--output", str(tmp_path / "out/part-0.jsonl"), *ARGUMENTS]
    assert shlex.split(tasks[0]["argv"]) == expected


def test_impossible_tasks_are_refused(tmp_path):
    with pytest.raises(ValueError, match="choose one of translate, align"):
        sharding.shard_tasks("dance", ["a.jsonl"], "out", [])
    with pytest.raises(ValueError, match="two shards are named 'a'"):
        sharding.shard_tasks("align", ["x/a.jsonl", "y/a.jsonl"], "out", [])
    with pytest.raises(ValueError, match="no shards"):
        sharding.shard_tasks("align", [], "out", [])


def test_a_shard_is_done_once(shards, tmp_path, monkeypatch):
    task = sharding.shard_tasks("translate", shards[:1], str(tmp_path / "out"), ARGUMENTS)[0]
    assert sharding.run_task(task) == {"output": task["output"], "was_done": False}
    monkeypatch.setattr(translation, "main", lambda argv: pytest.fail("the shard was done already"))
    assert sharding.run_task(task)["was_done"]


def test_ray_gives_the_files_of_single_calls(shards, tmp_path, capsys):
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        arguments = [
            "translate",
            "--shards",
            *shards,
            "--output_dir",
            str(tmp_path / "ray"),
            "--concurrency",
            "2",
        ]
        for done in (0, 3):
            sharding.main([*arguments, "--", *ARGUMENTS])
            assert f"3 shards, {done} of them done before" in capsys.readouterr().out
    finally:
        ray.shutdown()
    for task in sharding.shard_tasks("translate", shards, str(tmp_path / "single"), ARGUMENTS):
        sharding.run_task(task)
    for n in range(3):
        assert (tmp_path / f"ray/part-{n}.jsonl").read_bytes() == (
            tmp_path / f"single/part-{n}.jsonl"
        ).read_bytes()
