"""Caption, question, label and settings files of any content: rows in order, or a DataError, and nothing else."""

import gzip
import json
import math

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fuzzing import altered, damaged, fuzz, json_lines, json_values
from hypothesis import given
from hypothesis import strategies as st

from uc2.arguments import parse
from uc2.data_error import DataError
from uc2.object_labels import load_object_labels
from uc2.rows import load_captions, load_parallel_captions, load_questions

ROWS = {
    "parallel": {"image_id": "a", "captions": {"en": "a dog", "de": "ein Hund"}, "alignment": {"de": "0-0 1-1"}},
    "captions": {"image_id": "a", "language": "en", "caption": "a dog"},
    "questions": {"question_id": 1, "image_id": "a", "language": "en", "question": "what?", "answers": ["dog"]},
}
LOADERS = {"parallel": load_parallel_captions, "captions": load_captions, "questions": load_questions}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def check(kind: str, path, **options) -> None:
    """Loads the file; every row that comes back has its fields, as text."""
    try:
        rows = list(LOADERS[kind](str(path), **options))
    except DataError as error:
        assert str(path) in str(error) and "expected" in str(error)
        return
    for row in rows:
        assert isinstance(row["image_id"], str) and row["image_id"].strip()
        caption = row["captions"] if kind == "parallel" else {"en": row.get("caption") or row.get("question")}
        assert caption and all(text is None or text.strip() for text in caption.values())


@pytest.mark.parametrize("kind", ROWS)
@fuzz
@given(data=st.data())
def test_json_lines(tmp_path, kind, data):
    content = data.draw(json_lines(ROWS[kind]) | damaged(json.dumps(ROWS[kind]).encode()) | st.binary(max_size=40))
    ending = data.draw(st.sampled_from([".jsonl", ".json", ".jsonl.gz"]))
    path = tmp_path / f"rows{ending}"
    path.write_bytes(gzip.compress(content) if ending.endswith("gz") and data.draw(st.booleans()) else content)
    check(kind, path, streaming=True)


@pytest.mark.parametrize("kind", ROWS)
@fuzz
@given(data=st.data())
def test_json_lists(tmp_path, kind, data):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(data.draw(st.lists(altered(ROWS[kind]), max_size=3) | json_values)))
    check(kind, path, streaming=True)


@pytest.mark.parametrize("content", [json.dumps({**ROWS["captions"], "caption": "\ud800"}), "9" * 5000, "[" * 3000])
def test_what_the_conversion_could_choke_on(tmp_path, content):
    """Rows are written to Arrow files, which hold UTF-8 only."""
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match="rows.jsonl, row 1"):
        load_captions(str(path))


@pytest.mark.parametrize("ending", [".parquet", ".arrow"])
@fuzz
@given(data=st.data())
def test_columnar_files(tmp_path, ending, data):
    path = tmp_path / f"rows{ending}"
    table = pa.Table.from_pylist([ROWS["captions"]] * 3)
    if ending == ".parquet":
        pq.write_table(table, path)
    else:
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
    path.write_bytes(data.draw(damaged(path.read_bytes()) | st.binary(max_size=40)))
    check("captions", path, streaming=True)


@pytest.mark.parametrize("kind", ROWS)
def test_no_file_of_rows(tmp_path, kind):
    (tmp_path / "empty.jsonl").write_bytes(b"")
    (tmp_path / "folder.jsonl").mkdir()
    for name in ("empty.jsonl", "folder.jsonl", "missing.jsonl", "rows.csv"):
        with pytest.raises(DataError, match=name):
            LOADERS[kind](str(tmp_path / name))


@fuzz
@given(data=st.data())
def test_object_labels(tmp_path, data):
    path = tmp_path / "labels.json"
    sound = {"en": ["dog", "cat"], "de": ["Hund", "Katze"]}
    path.write_bytes(data.draw(json_lines(sound) | damaged(json.dumps(sound).encode()) | st.binary(max_size=20)))
    try:
        labels = load_object_labels(path)
    except DataError as error:
        assert "labels.json" in str(error)
        return
    assert labels and len({len(names) for names in labels.values()}) == 1
    assert all(name.strip() for names in labels.values() for name in names)


@fuzz
@given(data=st.data())
def test_object_label_lists(tmp_path, data):
    for name in ("img_label_objects.txt", "img_label_objects_de.txt"):
        (tmp_path / name).write_bytes(data.draw(damaged(b"yolk,egg\ngoal\n") | st.binary(max_size=20)))
    try:
        labels = load_object_labels(tmp_path)
    except DataError as error:
        assert str(tmp_path) in str(error)
        return
    assert set(labels) == {"en", "de"} and all(name.strip() for names in labels.values() for name in names)


@pytest.mark.parametrize("ending", [".json", ".yaml"])
@fuzz
@given(data=st.data())
def test_settings_files(tmp_path, capsys, ending, data):
    """A file that cannot be understood ends the program as a wrong flag does: status 2 and a sentence."""
    from run_vqa import DataArguments

    path = tmp_path / f"settings{ending}"
    sound = {"model_name_or_path": "m", "region_stores": ["r"], "num_answers": 3}
    path.write_bytes(data.draw(json_lines(sound) | damaged(json.dumps(sound).encode()) | st.binary(max_size=30)))
    flags = ["--model_name_or_path", "m", "--region_stores", "r"]
    try:
        (arguments,) = parse([DataArguments], [str(path), *flags])
    except SystemExit as stop:
        assert stop.code == 2 and "error: " in capsys.readouterr().err
        return
    assert isinstance(arguments.num_answers, int) and not isinstance(arguments.max_length, float)
    assert math.isfinite(arguments.num_answers)


def test_the_checks_are_those_of_the_conversion(tmp_path):
    """The fuzzed generator is what fills the cache."""
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROWS["captions"]))
    assert list(load_captions(str(path))) == list(load_captions(str(path), streaming=True))
