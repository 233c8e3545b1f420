"""Caption and question rows: loading from every source, and errors that say where."""

import gzip
import json
import os
import pickle
from pathlib import Path

import datasets
import pyarrow as pa
import pytest

from uc2.data_error import Found
from uc2.rows import (
    LANGUAGES,
    DataError,
    check_images_in_store,
    load_captions,
    load_parallel_captions,
    load_questions,
    write_jsonl,
)

SHARED = Path(__file__).resolve().parents[2] / "shared"

PARALLEL = [
    {"image_id": "a", "captions": {"ja": "赤い車", "en": "a red car"}, "alignment": {"ja": "0-0 1-1 2-2"}},
    {"image_id": "b", "captions": {"en": "a dog", "de": "ein Hund"}},
    {"image_id": "b", "captions": {"de": "noch ein Hund", "sw": "mbwa", "en": None}, "alignment": {"de": ""}},
]
CAPTIONS = [
    {"image_id": "a", "language": "en", "caption": "a red car"},
    {"image_id": "a", "language": "zh", "caption": "一辆红色的车"},
]
QUESTIONS = [
    {
        "question_id": "1",
        "image_id": "a",
        "language": "en",
        "question": "What colour?",
        "answers": ["red"] * 10,
    },
    {
        "question_id": 2,
        "image_id": "b",
        "language": "ja",
        "question": "何ですか",
        "answers": ["犬"],
        "answer_type": "x",
    },
    {"question_id": "3", "image_id": "b", "language": "en", "question": "Where?"},
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def fails(action, *parts: str) -> None:
    with pytest.raises(DataError) as caught:
        action()
    for part in parts:
        assert part in str(caught.value), str(caught.value)


# --- the error itself ---


def test_error_is_one_sentence_and_can_be_pickled():
    error = DataError(
        file="captions.jsonl", row=3, field="captions.de", found=17, expected="a non-empty string"
    )
    assert str(error) == "captions.jsonl, row 3, field 'captions.de': found 17, expected a non-empty string"
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error) and (again.row, again.field) == (3, "captions.de")
    assert str(DataError(found=Found("no file"), expected="one")) == "found no file, expected one"
    assert len(str(DataError(found="x" * 10_000))) < 200


# --- what is loaded ---


def check_parallel(rows) -> None:
    assert list(rows.features["captions"]) == ["en", "de", "ja", "sw"]  # the paper's order, then others
    assert rows["image_id"][:] == ["a", "b", "b"]
    assert rows[0]["captions"] == {"en": "a red car", "de": None, "ja": "赤い車", "sw": None}
    assert rows[0]["alignment"] == {"en": None, "de": None, "ja": "0-0 1-1 2-2", "sw": None}
    assert rows[1]["alignment"] == {"en": None, "de": None, "ja": None, "sw": None}
    assert rows[2]["alignment"]["de"] == "" and rows[2]["captions"]["en"] is None


def as_json_lines(rows, path: Path) -> Path:
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (path / "rows.jsonl").write_text("\ufeff" + "\n\n".join(lines), encoding="utf-8")
    return path / "rows.jsonl"


def as_compressed_lines(rows, path: Path) -> Path:
    with gzip.open(path / "rows.jsonl.gz", "wt", encoding="utf-8") as stream:
        stream.writelines(json.dumps(row) + "\r\n" for row in rows)
    return path / "rows.jsonl.gz"


def as_json_list(rows, path: Path) -> Path:
    (path / "rows.json").write_text(json.dumps(rows, indent=1))
    return path / "rows.json"


def as_lines_in_json(rows, path: Path) -> Path:
    return as_json_lines(rows, path).rename(path / "lines.json")


def as_parquet(rows, path: Path) -> Path:
    datasets.Dataset.from_list(rows).to_parquet(path / "rows.parquet")
    return path / "rows.parquet"


def as_arrow_file(rows, path: Path) -> Path:
    table = pa.Table.from_pylist(rows)
    with pa.OSFile(str(path / "rows.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return path / "rows.arrow"


def as_saved_dataset(rows, path: Path) -> Path:
    datasets.DatasetDict(train=datasets.Dataset.from_list(rows)).save_to_disk(path / "saved")
    return path / "saved"


SOURCES = [
    as_json_lines,
    as_compressed_lines,
    as_json_list,
    as_lines_in_json,
    as_parquet,
    as_arrow_file,
    as_saved_dataset,
]


@pytest.mark.parametrize("write", SOURCES)
def test_parallel_captions_of_every_source(tmp_path, write):
    # Tables need all keys in the first row.
    full = [PARALLEL[0], *({"alignment": None, **row} for row in PARALLEL[1:])]
    check_parallel(load_parallel_captions(write(full, tmp_path)))


def test_streamed_rows_equal_loaded_ones(tmp_path):
    file = str(as_json_lines(PARALLEL, tmp_path))
    streamed = load_parallel_captions(file, streaming=True)
    assert isinstance(streamed, datasets.IterableDataset)
    loaded = load_parallel_captions(file)
    for found, wanted in zip(streamed, loaded, strict=True):
        for field in ("captions", "alignment"):
            assert found[field] == {code: text for code, text in wanted[field].items() if text is not None}
    questions = str(write_jsonl(QUESTIONS, tmp_path / "questions.jsonl"))
    assert list(load_questions(questions, streaming=True)) == load_questions(questions).to_list()


def test_several_files_are_read_in_order(tmp_path):
    first = write_jsonl(PARALLEL[:1], tmp_path / "1.jsonl")
    second = write_jsonl(PARALLEL[1:], tmp_path / "2.jsonl")
    check_parallel(load_parallel_captions([first, second]))


def test_captions(tmp_path):
    assert load_captions(write_jsonl(CAPTIONS, tmp_path / "a.jsonl")).to_list() == CAPTIONS


def test_questions(tmp_path):
    rows = load_questions(write_jsonl(QUESTIONS, tmp_path / "a.jsonl"))
    assert rows["question_id"][:] == ["1", "2", "3"]
    assert rows["answers"][:] == [["red"] * 10, ["犬"], None]
    assert rows["answer_type"][:] == [None, "x", None]


def test_a_changed_file_is_read_again(tmp_path):
    file = write_jsonl(CAPTIONS, tmp_path / "a.jsonl")
    assert len(load_captions(file)) == 2
    write_jsonl(CAPTIONS[:1], file)
    assert len(load_captions(file)) == 1


def test_unused_fields_are_reported(tmp_path, caplog):
    file = write_jsonl([{**CAPTIONS[0], "caption_id": 3}], tmp_path / "a.jsonl")
    assert load_captions(file).column_names == ["image_id", "language", "caption"]
    assert "caption_id" in caplog.text


@pytest.mark.skipif(not SHARED.exists(), reason="the ten photographs are not here")
def test_ten_photographs():
    directory = SHARED / "data/coco_regions"
    rows = load_parallel_captions(directory / "captions.jsonl", languages=LANGUAGES)
    assert len(rows) == 10 and all(all(row["captions"].values()) for row in rows)
    assert set(load_questions(directory / "questions.jsonl")["language"]) == {"en", "ja"}


# --- what is refused ---

BAD_PARALLEL = [
    ({"image_id": 3}, ["'image_id'", "found 3"]),
    ({"image_id": ""}, ["'image_id'"]),
    ({"captions": "a dog"}, ["'captions'", "'a dog'"]),
    ({"captions": {}}, ["'captions'", "at least one language"]),
    ({"captions": {"en": None}}, ["'captions'", "at least one language"]),
    ({"captions": {"en": "a dog", "de": 17}}, ["'captions.de'", "found 17"]),
    ({"captions": {"en": " \n"}}, ["'captions.en'", "non-empty"]),
    ({"alignment": "0-0"}, ["'alignment'"]),
    ({"alignment": {"fr": "0-0"}}, ["'alignment.fr'", "en, de"]),
    ({"alignment": {"de": "0-0,1-1"}}, ["'alignment.de'", "Pharaoh"]),
    ({"alignment": {"de": "0-0  1-1"}}, ["'alignment.de'"]),
    ({"alignment": {"de": "0--1"}}, ["'alignment.de'"]),
]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(("change", "parts"), BAD_PARALLEL)
def test_malformed_parallel_captions(tmp_path, change, parts, streaming):
    file = as_json_lines([PARALLEL[0], {**PARALLEL[1], **change}], tmp_path)  # a blank line between the two
    fails(lambda: list(load_parallel_captions(file, streaming=streaming)), f"{file}, row 3, field", *parts)


@pytest.mark.parametrize(
    ("load", "row", "parts"),
    [
        (load_captions, {"image_id": "a", "language": "en"}, ["'caption'", "image_id, language"]),
        (load_captions, {**CAPTIONS[0], "caption": ""}, ["'caption'"]),
        (load_captions, {**CAPTIONS[0], "language": None}, ["'language'", "None"]),
        (load_parallel_captions, {"image_id": "a", "caption": "x"}, ["'captions'", "only image_id, caption"]),
        (load_questions, {**QUESTIONS[0], "question_id": None}, ["'question_id'"]),
        (load_questions, {**QUESTIONS[0], "question_id": True}, ["'question_id'"]),
        (load_questions, {**QUESTIONS[0], "question": " "}, ["'question'"]),
        (load_questions, {**QUESTIONS[0], "answers": []}, ["'answers'"]),
        (load_questions, {**QUESTIONS[0], "answers": "red"}, ["'answers'", "'red'"]),
        (load_questions, {**QUESTIONS[0], "answers": ["red", 2]}, ["'answers[1]'", "found 2"]),
        (load_captions, ["a", "en", "x"], ["an object"]),
    ],
)
def test_malformed_rows(tmp_path, load, row, parts):
    file = write_jsonl([row], tmp_path / "a.jsonl")
    fails(lambda: load(file), f"{file}, row 1", *parts)


def test_question_ids_are_unique_over_all_files(tmp_path):
    files = [write_jsonl(QUESTIONS, tmp_path / f"{name}.jsonl") for name in "ab"]
    fails(lambda: load_questions(files), f"{files[1]}, row 1, field 'question_id'", f"row 1 of {files[0]}")


def test_languages_outside_the_given_ones(tmp_path):
    file = write_jsonl(PARALLEL, tmp_path / "a.jsonl")
    fails(
        lambda: load_parallel_captions(file, languages=LANGUAGES),
        "row 3",
        "'captions.sw'",
        "en, de, fr, cs, ja, zh",
    )
    captions = write_jsonl(CAPTIONS, tmp_path / "b.jsonl")
    fails(lambda: load_captions(captions, languages=["en"]), "row 2", "'language'", "'zh'")


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (b'{"image_id": "a"\n', ["row 1", "malformed JSON"]),
        (json.dumps(CAPTIONS[0]).encode() + b"\n\n\xff\n", ["row 3", "malformed JSON"]),
        (b"", ["no row"]),
        (b"\n\n", ["no row"]),
    ],
)
def test_malformed_files(tmp_path, content, parts):
    file = tmp_path / "a.jsonl"
    file.write_bytes(content)
    fails(lambda: load_captions(file), str(file), *parts)


def test_unreadable_sources(tmp_path):
    fails(lambda: load_captions(tmp_path / "absent.jsonl"), "absent.jsonl", "no such file")
    fails(lambda: load_captions("absent.jsonl"), "absent.jsonl", "no such file")
    fails(lambda: load_captions([]), "no file")
    (tmp_path / "a.csv").write_text("a,b")
    fails(lambda: load_captions(tmp_path / "a.csv"), "a.csv", ".jsonl, .json, .parquet, .arrow")
    parquet = as_parquet(CAPTIONS, tmp_path)
    parquet.write_bytes(parquet.read_bytes()[:-9])
    fails(lambda: load_captions(parquet), str(parquet), "unreadable")
    saved = as_saved_dataset(CAPTIONS, tmp_path)
    fails(lambda: load_captions(saved, split="test"), str(saved), "'test'")


# --- joining with images ---


def test_images_must_be_in_the_store(tmp_path):
    file = as_json_lines(PARALLEL, tmp_path)
    rows = load_parallel_captions(file)
    check_images_in_store(rows, file, {"a", "b"})
    fails(lambda: check_images_in_store(rows, file, {"a"}), f"{file}, row 3, field 'image_id': found 'b'")
    files = [write_jsonl(PARALLEL[:1], tmp_path / "1.jsonl"), write_jsonl(PARALLEL[1:], tmp_path / "2.jsonl")]
    rows = load_parallel_captions(files)
    fails(lambda: check_images_in_store(rows, files, {"a"}), f"{files[1]}, row 1")


# --- writing ---


def test_json_lines_are_written_whole_or_not_at_all(tmp_path):
    file = write_jsonl(CAPTIONS, tmp_path / "new" / "a.jsonl")
    assert file.read_text(encoding="utf-8").splitlines()[1] == json.dumps(CAPTIONS[1], ensure_ascii=False)
    before = file.read_bytes()

    def broken():
        yield {}
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_jsonl(broken(), file)
    assert file.read_bytes() == before and os.listdir(file.parent) == ["a.jsonl"]
