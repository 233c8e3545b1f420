"""The region store: what is written is read back; what is malformed is named."""

import json
import multiprocessing
import os
import pickle
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from uc2 import region_store
from uc2.data_error import DataError
from uc2.region_store import RegionRow, RegionStore, write_region_store

FEATURE_SIZE, CLASSES = 5, 7


def make_row(number: int, count: int | None = None, probs: bool = False) -> RegionRow:
    rng = np.random.default_rng(number)
    count = count or int(rng.integers(1, 6))
    corners = rng.uniform(0, 30, (count, 2))
    return RegionRow(
        image_id=f"image{number}",
        image_height=80,
        image_width=100,
        boxes=np.concatenate([corners, corners + rng.uniform(1, 40, (count, 2))], axis=1).astype(np.float32),
        features=rng.normal(size=(count, FEATURE_SIZE)).astype(np.float16),
        class_ids=rng.integers(0, CLASSES, count),
        class_scores=np.sort(rng.random(count).astype(np.float32))[::-1],
        class_probs=rng.dirichlet(np.ones(CLASSES), count).astype(np.float16) if probs else None,
    )


ROWS = [make_row(number) for number in range(10)]


def assert_same(row: RegionRow, expected: RegionRow) -> None:
    assert (row.image_id, row.image_height, row.image_width) == (expected.image_id, 80, 100)
    for field, dtype in (
        ("boxes", np.float32),
        ("features", np.float16),
        ("class_ids", np.int64),
        ("class_scores", np.float32),
        ("class_probs", np.float16),
    ):
        found, wanted = getattr(row, field), getattr(expected, field)
        if wanted is None:
            assert found is None
        else:
            assert found.dtype == dtype
            np.testing.assert_array_equal(found, wanted)


def fails(action, *parts: str) -> None:
    with pytest.raises(DataError) as caught:
        action()
    for part in parts:
        assert part in str(caught.value), str(caught.value)


@pytest.fixture
def path(tmp_path) -> Path:
    return write_region_store(ROWS, tmp_path / "store", rows_per_shard=4)


# --- reading what was written ---


@pytest.mark.parametrize("probs", [False, True])
def test_round_trip(tmp_path, probs):
    rows = [make_row(number, probs=probs) for number in range(300)]
    store = RegionStore(write_region_store(rows, tmp_path / "store", rows_per_shard=140))
    assert list(store) == [row.image_id for row in rows]
    assert (len(store), store.feature_size, store.num_classes) == (
        300,
        FEATURE_SIZE,
        CLASSES if probs else None,
    )
    assert store.region_counts.tolist() == [len(row.boxes) for row in rows]
    for row in rows:
        assert_same(store[row.image_id], row)
        assert store.num_regions(row.image_id) == len(row.boxes)
        np.testing.assert_array_equal(store.class_scores(row.image_id), row.class_scores)
    assert "image0" in store and "image300" not in store
    with pytest.raises(KeyError):
        store["image300"]
    assert store.validate() == []
    assert sorted(os.listdir(tmp_path / "store")) == [
        *(f"shard-0000{i}.arrow" for i in range(3)),
        "store.json",
    ]


def test_features_are_views_of_the_file(path):
    row = RegionStore(path)["image3"]
    assert not row.features.flags.owndata and not row.features.flags.writeable


def test_normalized_boxes():
    row = replace(ROWS[0], boxes=np.float32([[10, 20, 100, 80]]))
    np.testing.assert_allclose(row.normalized_boxes, [[0.1, 0.25, 1.0, 1.0]])
    assert row.normalized_boxes.dtype == np.float32


def test_regions_are_sorted_cast_and_clipped(tmp_path):
    row = RegionRow(
        image_id="a",
        image_height=80,
        image_width=100,
        boxes=[[1, 1, 5, 5], [-0.4, 2, 100.9, 80.5], [3, 3, 6, 6]],
        features=np.arange(15.0).reshape(3, 5),
        class_ids=[4, 5, 6],
        class_scores=[0.2, 0.9, 0.5],
    )
    read = RegionStore(write_region_store([row], tmp_path / "store"))["a"]
    np.testing.assert_array_equal(read.boxes, [[0, 2, 100, 80], [3, 3, 6, 6], [1, 1, 5, 5]])
    assert read.class_ids.tolist() == [5, 6, 4]
    np.testing.assert_array_equal(read.class_scores, np.float32([0.9, 0.5, 0.2]))
    np.testing.assert_array_equal(read.features, [[5, 6, 7, 8, 9], [10, 11, 12, 13, 14], [0, 1, 2, 3, 4]])


def test_several_stores_are_one(tmp_path):
    first = write_region_store(ROWS[:4], tmp_path / "a")
    second = write_region_store(ROWS[4:], tmp_path / "b")
    store = RegionStore([first, second])
    assert list(store) == [row.image_id for row in ROWS]
    assert_same(store["image7"], ROWS[7])
    wide = write_region_store(
        [replace(make_row(20), features=np.zeros((len(make_row(20).boxes), 9)))], tmp_path / "c"
    )
    fails(lambda: RegionStore([first, wide]), str(wide), "width 9", "5")
    fails(lambda: RegionStore([first, first]), "'image_id'", "'image0'")
    more = write_region_store([make_row(30, probs=True)], tmp_path / "d")
    assert RegionStore(more).num_classes == CLASSES and RegionStore([first, more]).num_classes is None
    other = replace(make_row(31), class_probs=np.zeros((len(make_row(31).boxes), 9)))
    write_region_store([other], tmp_path / "e")
    fails(lambda: RegionStore([more, tmp_path / "e"]), "7 and 9 classes")


def test_a_directory_of_stores_is_one(tmp_path):
    for part in range(2):
        write_region_store(ROWS[part::2], tmp_path / "parts" / f"{part}")
    assert sorted(RegionStore(tmp_path / "parts")) == [row.image_id for row in ROWS]


def _count(source: Path) -> int:
    return len(RegionStore(source))


def test_processes_that_open_the_same_tables_convert_them_once(tmp_path):
    source = as_parquet(pa.table(columns()), tmp_path)
    with multiprocessing.get_context("fork").Pool(4) as pool:
        assert pool.map(_count, [source] * 4) == [10] * 4
    assert RegionStore(source) != RegionStore(source)


def _read(store: RegionStore, image_id: str) -> list:
    return store[image_id].features.tolist()


def test_pickled_and_forked_stores_read(path):
    store = RegionStore(path)
    assert len(pickle.dumps(store)) < 1000
    assert_same(pickle.loads(pickle.dumps(store))["image5"], ROWS[5])
    with multiprocessing.get_context("fork").Pool(2) as pool:
        read = pool.starmap(_read, [(store, row.image_id) for row in ROWS])
    assert read == [row.features.tolist() for row in ROWS]


# --- writing malformed rows ---


def _changed(array, value, index=0):
    array = np.array(array)
    array[index] = value
    return array


BAD_ROWS = [
    (dict(image_id=""), "'image_id'"),
    (dict(image_id=7), "'image_id'"),
    (dict(image_id="image0"), "row 1 has it already"),
    (dict(image_height=0), "'image_height'"),
    (dict(image_width="wide"), "'image_width'"),
    (dict(boxes=np.zeros((0, 4))), "'boxes'"),
    (dict(boxes=np.zeros((3, 5))), "'boxes'"),
    (dict(boxes=[[1, 2], [3]]), "not numbers"),
    (dict(boxes=[[0, 0, 10, 10], [5, 0, 5, 10], [0, 0, 10, 10]]), "'boxes[1]': found [5, 0, 5, 10]"),
    (dict(boxes=[[0, 0, 10, 10], [0, 0, 10, 82], [0, 0, 10, 10]]), "y2 <= 80"),
    (dict(boxes=[[0, 0, 10, 10], [-2, 0, 10, 80], [0, 0, 10, 10]]), "'boxes[1]'"),
    (dict(boxes=[[0, 0, 10, 10], [0, 0, 10, 80], [0, np.nan, 10, 10]]), "'boxes[2]'"),
    (dict(features=np.zeros((2, 5))), "'features': found shape (2, 5)"),
    (dict(features=np.zeros((3, 4))), "'features': found width 4"),
    (dict(features=_changed(np.zeros((3, 5)), np.nan, (2, 1))), "NaN or infinity in region 2"),
    (dict(features=_changed(np.zeros((3, 5)), np.inf)), "NaN or infinity in region 0"),
    (dict(features=_changed(np.zeros((3, 5)), 70000)), "float16"),
    (dict(class_ids=[0, 1]), "'class_ids'"),
    (dict(class_ids=[0, 1, -1]), "'class_ids'"),
    (dict(class_ids=[0, 1, 1.5]), "whole numbers"),
    (dict(class_scores=[0.5, 0.4, np.nan]), "'class_scores'"),
    (dict(class_scores=[1.5, 0.4, 0.1]), "'class_scores'"),
    (dict(class_probs=np.zeros((3, 7))), "'class_probs': found width 7"),
    (dict(class_probs=np.full((3, 7), np.nan)), "'class_probs'"),
    (dict(class_ids=[0, 1, 7], class_probs=np.zeros((3, 7))), "from 0 to 6"),
]


@pytest.mark.parametrize(("change", "part"), BAD_ROWS)
def test_malformed_rows_name_row_and_field_and_write_nothing(tmp_path, change, part):
    rows = [ROWS[0], replace(make_row(50, count=3), **change)]
    fails(lambda: write_region_store(rows, tmp_path / "store"), str(tmp_path / "store"), "row 2", part)
    assert os.listdir(tmp_path) == []


def test_nothing_appears_before_the_end(tmp_path):
    def rows():
        yield from ROWS
        assert not (tmp_path / "store").exists()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_region_store(rows(), tmp_path / "store", rows_per_shard=2)
    assert os.listdir(tmp_path) == []


def test_existing_stores_are_kept_unless_asked(path):
    with pytest.raises(FileExistsError, match="overwrite"):
        write_region_store(ROWS[:1], path)
    assert len(RegionStore(path)) == len(ROWS)
    write_region_store(ROWS[:1], path, overwrite=True)
    assert len(RegionStore(path)) == 1
    assert os.listdir(path.parent) == ["store"]
    fails(lambda: write_region_store([], path, overwrite=True), "no image")
    assert len(RegionStore(path)) == 1


# --- opening damaged stores ---


def test_damaged_stores(path):
    shard = path / "shard-00001.arrow"
    content = shard.read_bytes()
    shard.write_bytes(content[:-40])
    fails(lambda: RegionStore(path), str(shard), "bytes")
    shard.write_bytes(b"\0" * len(content))
    fails(lambda: RegionStore(path), str(shard), "unreadable")
    shard.unlink()
    fails(lambda: RegionStore(path), str(shard), "no such file")
    (path / "store.json").write_text("{")
    fails(lambda: RegionStore(path), str(path / "store.json"))
    (path / "store.json").write_text("{}")
    fails(lambda: RegionStore(path), str(path / "store.json"))
    fails(lambda: RegionStore(path / "absent"), "absent", "no such file")
    fails(lambda: RegionStore([]), "no path")


def rewrite_shard(path: Path, change) -> Path:
    """Replace the first shard by one whose table `change` has changed, and keep store.json consistent."""
    shard = path / "shard-00000.arrow"
    with pa.OSFile(str(shard)) as source:
        table = change(pa.ipc.open_file(source).read_all())
    with pa.OSFile(str(shard), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    manifest = json.loads((path / "store.json").read_text())
    manifest["shards"][0] |= {"bytes": shard.stat().st_size}
    (path / "store.json").write_text(json.dumps(manifest))
    return shard


def replace_cell(name: str, row: int, change):
    def apply(table: pa.Table) -> pa.Table:
        cells = table[name].to_pylist()
        cells[row] = change(cells[row])
        index = table.schema.get_field_index(name)
        return table.set_column(
            index, table.schema.field(name), pa.array(cells, table.schema.field(name).type)
        )

    return apply


@pytest.mark.parametrize(
    ("field", "change", "part"),
    [
        ("features", lambda cell: cell[:-2], "bytes"),
        ("class_ids", lambda cell: cell + [1], "numbers"),
        ("class_scores", lambda cell: cell[1:], "numbers"),
        ("image_id", lambda cell: "image0", "row 1 of"),
        ("image_id", lambda cell: None, "missing"),
    ],
)
def test_structure_is_checked_on_opening(path, field, change, part):
    shard = rewrite_shard(path, replace_cell(field, 2, change))
    fails(lambda: RegionStore(path), str(shard), field, part)


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("features", lambda cell: np.float16(np.nan).tobytes() + cell[2:]),
        ("features", lambda cell: np.float16(-np.inf).tobytes() + cell[2:]),
        ("boxes", lambda cell: [[0, 0, 500, 500]] + cell[1:]),
        ("class_scores", lambda cell: [2.0] + cell[1:]),
        ("class_scores", lambda cell: sorted(cell)),
        ("class_ids", lambda cell: [-1] + cell[1:]),
    ],
)
def test_values_are_checked_by_validate(path, capsys, field, change):
    shard = rewrite_shard(path, replace_cell(field, 2, change))
    (error,) = RegionStore(path).validate()
    assert (Path(error.file), error.row) == (shard, 3) and error.field.startswith(field)
    assert region_store.main([str(path)]) == 1
    assert "row 3" in capsys.readouterr().out


def test_command_line_summary(path, capsys):
    assert region_store.main([str(path)]) == 0
    assert "10 images" in capsys.readouterr().out
    assert region_store.main([str(path / "absent")]) == 1


# --- Parquet and Arrow written by others ---


def columns(rows=ROWS) -> dict:
    return {
        "image_id": [row.image_id for row in rows],
        "image_height": [row.image_height for row in rows],
        "image_width": [row.image_width for row in rows],
        "boxes": [row.boxes.tolist() for row in rows],
        "features": [row.features.tobytes() for row in rows],
        "class_ids": [row.class_ids.tolist() for row in rows],
        "class_scores": [row.class_scores.tolist() for row in rows],
    }


def as_parquet(table: pa.Table, path: Path) -> Path:
    pq.write_table(table, path / "regions.parquet", row_group_size=3)
    return path / "regions.parquet"


def as_arrow_stream(table: pa.Table, path: Path) -> Path:
    with (
        pa.OSFile(str(path / "regions.arrow"), "wb") as sink,
        pa.ipc.new_stream(sink, table.schema) as writer,
    ):
        writer.write_table(table)
    return path / "regions.arrow"


def as_directory(table: pa.Table, path: Path) -> Path:
    (path / "regions").mkdir()
    pq.write_table(table.slice(0, 4), path / "regions/0.parquet")
    pq.write_table(table.slice(4), path / "regions/1.parquet")
    return path / "regions"


def as_dataset(table: pa.Table, path: Path) -> Path:
    datasets.Dataset(table).save_to_disk(path / "saved")
    return path / "saved"


@pytest.mark.parametrize("write", [as_parquet, as_arrow_stream, as_directory, as_dataset])
@pytest.mark.parametrize("large", [False, True])
def test_tables_of_others_are_converted_once(tmp_path, caplog, write, large):
    table = pa.table(columns())
    if large:
        for name, kind in (("image_id", pa.large_string()), ("features", pa.large_binary())):
            index = table.schema.get_field_index(name)
            table = table.set_column(index, name, table[name].cast(kind))
    source = write(table, tmp_path)
    store = RegionStore(source)
    assert list(store) == [row.image_id for row in ROWS]
    for row in ROWS:
        assert_same(store[row.image_id], row)
    assert "Converting" in caplog.text
    caplog.clear()
    RegionStore(source)
    assert not caplog.text


def test_changed_tables_are_converted_again(tmp_path):
    source = as_parquet(pa.table(columns()), tmp_path)
    assert len(RegionStore(source)) == 10
    killed = tmp_path / ".regions.parquet.region_store.abc.tmp"
    killed.mkdir()
    pq.write_table(pa.table(columns(ROWS[:3])), source)
    assert len(RegionStore(source)) == 3
    assert not killed.exists()


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"features": lambda cell: cell[:-1]}, ["row 3", "'features'", "bytes"]),
        ({"features": lambda cell: np.float16(np.nan).tobytes() + cell[2:]}, ["row 3", "'features'", "NaN"]),
        ({"boxes": lambda cell: [[0, 0, 300, 10]] + cell[1:]}, ["row 3", "'boxes[0]'"]),
        ({"boxes": lambda cell: None}, ["row 3"]),
        ({"image_id": lambda cell: None}, ["row 3", "'image_id'"]),
        ({"image_height": lambda cell: None}, ["row 3", "'image_height'"]),
        ({"class_ids": lambda cell: cell + [0]}, ["row 3", "'class_ids'"]),
        ({"class_scores": lambda cell: None}, ["row 3", "'class_scores'"]),
    ],
)
def test_malformed_tables_name_file_row_and_field(tmp_path, change, parts):
    content = columns()
    for name, alter in change.items():
        content[name][2] = alter(content[name][2])
    source = as_parquet(pa.table(content), tmp_path)
    fails(lambda: RegionStore(source), str(source), *parts)
    assert not (tmp_path / "regions.parquet.region_store").exists()


def test_tables_without_a_column_or_cut_off(tmp_path):
    content = columns()
    del content["class_ids"]
    source = as_parquet(pa.table(content), tmp_path)
    fails(lambda: RegionStore(source), str(source), "'class_ids'", "only the columns")
    source.write_bytes(source.read_bytes()[:-20])
    fails(lambda: RegionStore(source), str(source), "unreadable")
    (tmp_path / "empty").mkdir()
    fails(lambda: RegionStore(tmp_path / "empty"), "store.json")


def test_regions_without_object_classes_are_told(path, tmp_path):
    assert RegionStore(path).has_classes
    fillers = {"class_ids": np.zeros(3, np.int64), "class_scores": np.ones(3, np.float32), "class_probs": None}
    write_region_store([replace(make_row(30, 3), **fillers)], tmp_path / "grid")
    assert not RegionStore(tmp_path / "grid").has_classes
    assert RegionStore([path, tmp_path / "grid"]).has_classes
