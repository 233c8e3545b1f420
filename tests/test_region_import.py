"""Importers of region features, each against files written here as the other project writes them."""

import base64
import csv
import io
import json
import os
import pickle
import sys
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
from folder_contents import contents
from interruptions import run_stopped_at_every_fifth_rename

from uc2 import region_import
from uc2.data_error import DataError, OptionError
from uc2.object_labels import load_object_labels
from uc2.region_import import FORMATS, import_regions, main
from uc2.region_records import RecordOptions
from uc2.region_store import RegionStore
from uc2.safe_decoding import DecodingError, loads_msgpack, loads_npz, loads_pickle

lmdb = pytest.importorskip("lmdb")
msgpack = pytest.importorskip("msgpack")
msgpack_numpy = pytest.importorskip("msgpack_numpy")
h5py = pytest.importorskip("h5py")

SHARED = Path(__file__).resolve().parents[2] / "shared"
csv.field_size_limit(sys.maxsize)

FEATURE_SIZE = 6
LXMERT = "img_id img_h img_w objects_id objects_conf attrs_id attrs_conf num_boxes boxes features".split()
CLASSIC = ["image_id", "image_w", "image_h", "num_boxes", "boxes", "features"]


def example(number: int, count: int = 3) -> dict:
    """One image with falling scores; 100 wide, 80 high."""
    rng = np.random.default_rng(number)
    corners = rng.uniform(0, 40, (count, 2))
    return {
        "id": f"image{number}",
        "boxes": np.concatenate([corners, corners + 30], axis=1).astype(np.float32),
        "features": rng.normal(size=(count, FEATURE_SIZE)).astype(np.float32),
        "ids": rng.integers(0, 1600, count),
        "scores": np.linspace(0.9, 0.3, count).astype(np.float32),
    }


EXAMPLES = [example(0), example(1, 5)]


def check_store(path, *, normalized=False, classes=True, tolerance=0.0) -> RegionStore:
    """The store holds EXAMPLES."""
    store = RegionStore(path)
    assert list(store) == [item["id"] for item in EXAMPLES]
    assert store.validate() == []
    size = np.array([100, 80, 100, 80])
    for item in EXAMPLES:
        row = store[item["id"]]
        np.testing.assert_allclose(row.normalized_boxes, item["boxes"] / size, atol=tolerance or 1e-6)
        np.testing.assert_array_equal(row.features, item["features"].astype(np.float16))
        assert (row.image_height, row.image_width) == ((1, 1) if normalized else (80, 100))
        if classes:
            np.testing.assert_array_equal(row.class_ids, item["ids"])
            np.testing.assert_allclose(row.class_scores, item["scores"], atol=tolerance)
    return store


def encoded(array: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()


def tsv_cells(item: dict) -> dict:
    count = len(item["ids"])
    return {
        "img_id": item["id"],
        "image_id": item["id"],
        "img_h": 80,
        "image_h": 80,
        "img_w": 100,
        "image_w": 100,
        "objects_id": encoded(item["ids"].astype(np.int64)),
        "objects_conf": encoded(item["scores"]),
        "attrs_id": encoded(np.zeros(count, np.int64)),
        "attrs_conf": encoded(np.zeros(count, np.float32)),
        "num_boxes": count,
        "boxes": encoded(item["boxes"]),
        "features": encoded(item["features"]),
    }


def write_tsv_as_others_do(path: Path, columns: list[str], header: bool = False, rows=None) -> Path:
    with open(path, "w", newline="") as stream:
        writer = csv.DictWriter(stream, columns, delimiter="\t", extrasaction="ignore")
        if header:
            writer.writeheader()
        for cells in rows or map(tsv_cells, EXAMPLES):
            writer.writerow(cells)
    return path


def fails(action, *parts: str) -> None:
    with pytest.raises(DataError) as caught:
        action()
    for part in parts:
        assert part in str(caught.value), str(caught.value)


# --- TSV ---


@pytest.mark.parametrize("header", [False, True])
def test_tsv_in_lxmert_layout(tmp_path, header):
    file = write_tsv_as_others_do(tmp_path / "a.tsv", LXMERT, header)
    output = main(["--format", "tsv", "--input", str(file), "--output", str(tmp_path / "store")])
    check_store(output)


def test_tsv_in_classic_layout_has_width_first_and_no_classes(tmp_path):
    file = write_tsv_as_others_do(tmp_path / "a.tsv", CLASSIC)
    fails(lambda: import_regions("tsv", [file], tmp_path / "store"), "row 1", "class_ids", "no_classes")
    output = import_regions("tsv", [file], tmp_path / "store", options=RecordOptions(no_classes=True))
    store = check_store(output, classes=False)
    assert store["image0"].class_scores.tolist() == [1, 1, 1]


def test_tsv_with_named_columns(tmp_path):
    columns = LXMERT[::-1]
    file = write_tsv_as_others_do(tmp_path / "a.tsv", columns)
    output = main(["--input", str(file), "--columns", ",".join(columns), "--output", str(tmp_path / "store")])
    check_store(output)


def test_tsv_is_sorted_by_falling_score(tmp_path):
    item = EXAMPLES[0]
    order = [2, 0, 1]
    shuffled = {
        name: value[order] if isinstance(value, np.ndarray) else value for name, value in item.items()
    }
    rows = [tsv_cells(shuffled), tsv_cells(EXAMPLES[1])]
    file = write_tsv_as_others_do(tmp_path / "a.tsv", LXMERT, rows=rows)
    check_store(import_regions("tsv", [file], tmp_path / "store"))


def test_tsv_export_comes_back_unchanged(tmp_path):
    file = write_tsv_as_others_do(tmp_path / "a.tsv", LXMERT)
    store = import_regions("tsv", [file], tmp_path / "store")
    exported = main(["--export", "--input", str(store), "--output", str(tmp_path / "b.tsv")])
    with open(exported, newline="") as stream:
        cells = next(csv.DictReader(stream, LXMERT, delimiter="\t"))
    boxes = np.frombuffer(base64.b64decode(cells["boxes"]), np.float32).reshape(-1, 4)
    np.testing.assert_array_equal(boxes, EXAMPLES[0]["boxes"])
    assert (cells["img_h"], cells["img_w"], cells["num_boxes"]) == ("80", "100", "3")
    check_store(import_regions("tsv", [exported], tmp_path / "again"))


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"features": "!!!"}, ["row 2", "'features'", "base64"]),
        ({"features": encoded(np.zeros(7, np.float32))}, ["row 2", "'features'", "28 bytes for 5 boxes"]),
        ({"features": encoded(np.full((5, 6), np.nan, np.float32))}, ["row 2", "'features'", "NaN"]),
        ({"features": encoded(np.full((5, 6), 1e6, np.float32))}, ["row 2", "'features'", "float16"]),
        ({"features": encoded(np.zeros((5, 4), np.float32))}, ["row 2", "'features'", "width 4", "6"]),
        ({"boxes": encoded(np.float32([[0, 0, 0, 10]] * 5))}, ["row 2", "'boxes[0]'", "x1 < x2"]),
        ({"boxes": encoded(np.float32([[0, 0, 103, 10]] * 5))}, ["row 2", "'boxes[0]'", "<= 100"]),
        ({"objects_id": encoded(np.full(5, -1))}, ["row 2", "'class_ids'", "-1"]),
        ({"objects_conf": encoded(np.full(5, 2.0, np.float32))}, ["row 2", "'class_scores'", "[0, 1]"]),
        ({"num_boxes": "many"}, ["row 2", "'num_boxes'", "'many'"]),
        ({"img_h": "tall"}, ["row 2", "'image_height'", "tall"]),
        ({"img_h": 0}, ["row 2", "'image_height'", "positive"]),
        ({"img_id": ""}, ["row 2", "'image_id'"]),
        ({"img_id": "image0"}, ["row 2", "'image_id'", "image 1 has it"]),
    ],
)
def test_malformed_tsv_is_one_error_and_leaves_nothing(tmp_path, change, parts):
    rows = [tsv_cells(EXAMPLES[0]), {**tsv_cells(EXAMPLES[1]), **change}]
    file = write_tsv_as_others_do(tmp_path / "a.tsv", LXMERT, rows=rows)
    fails(lambda: import_regions("tsv", [file], tmp_path / "store"), str(file), *parts)
    assert os.listdir(tmp_path) == ["a.tsv"]


def test_tsv_of_other_shape(tmp_path):
    (tmp_path / "two.tsv").write_text("a\tb\n")
    (tmp_path / "cut.tsv").write_text(write_tsv_as_others_do(tmp_path / "a.tsv", LXMERT).read_text()[:-300])
    (tmp_path / "empty.tsv").write_text("")
    fails(lambda: import_regions("tsv", [tmp_path / "two.tsv"], tmp_path / "store"), "2 column(s)")
    fails(lambda: import_regions("tsv", [tmp_path / "cut.tsv"], tmp_path / "store"), "row 2")
    fails(lambda: import_regions("tsv", [tmp_path / "empty.tsv"], tmp_path / "store"), "no image")
    fails(lambda: import_regions("tsv", [tmp_path / "absent.tsv"], tmp_path / "store"), "no such file")
    assert not (tmp_path / "store").exists()


@pytest.mark.skipif(not SHARED.exists(), reason="the ten photographs are not here")
def test_ten_photographs(tmp_path):
    source = SHARED / "data/coco_regions"
    store = RegionStore(import_regions("tsv", [source / "train2014_obj36.tsv"], tmp_path / "store"))
    assert (len(store), store.feature_size, set(store.region_counts)) == (10, 2048, {36})
    labels = load_object_labels(source / "object_labels")
    bedroom = store["COCO_train2014_000000084002"]
    assert [labels["en"][i] for i in bedroom.class_ids[:3]] == ["bed", "headboard", "pillow"]
    with open(source / "train2014_obj36.tsv", newline="") as stream:
        for cells in csv.DictReader(stream, LXMERT, delimiter="\t"):
            row = store[cells["img_id"]]
            scores = np.frombuffer(base64.b64decode(cells["objects_conf"]), np.float32)
            features = np.frombuffer(base64.b64decode(cells["features"]), np.float32).reshape(36, 2048)
            order = np.argsort(-scores, kind="stable")
            np.testing.assert_array_equal(row.class_scores, scores[order])
            np.testing.assert_array_equal(row.features, features[order].astype(np.float16))


# --- UNITER ---


def uniter_values(item: dict) -> dict:
    boxes = item["boxes"] / np.array([100, 80, 100, 80], np.float32)
    sizes = boxes[:, 2:] - boxes[:, :2]
    soft_labels = np.zeros((len(boxes), 1601))
    soft_labels[np.arange(len(boxes)), item["ids"] + 1] = item["scores"]
    values = {
        "features": item["features"],
        "norm_bb": np.concatenate([boxes, sizes], axis=1),
        "conf": item["scores"],
        "soft_labels": soft_labels,
    }
    return {name: array.astype(np.float16) for name, array in values.items()}


def as_msgpack(values: dict) -> bytes:
    return msgpack.dumps(values, default=msgpack_numpy.encode, use_bin_type=True)


def as_compressed_npz(values: dict) -> bytes:
    stream = io.BytesIO()
    np.savez_compressed(stream, **values, allow_pickle=True)
    return stream.getvalue()


def write_lmdb(path: Path, entries: dict[str, bytes]) -> Path:
    with lmdb.open(str(path), map_size=1 << 24) as database, database.begin(write=True) as transaction:
        for key, value in entries.items():
            transaction.put(key.encode(), value)
    return path


@pytest.mark.parametrize("pack", [as_msgpack, as_compressed_npz])
def test_uniter_lmdb(tmp_path, pack):
    entries = {f"{item['id']}.npz": pack(uniter_values(item)) for item in EXAMPLES}
    entries["__keys__"] = json.dumps(list(entries)).encode()
    path = write_lmdb(tmp_path / "feat_th0.2_max100_min10", entries)
    output = main(["--format", "uniter_lmdb", "--input", str(path), "--output", str(tmp_path / "store")])
    store = check_store(output, normalized=True, tolerance=1e-3)
    assert store.num_classes == 1600
    for item in EXAMPLES:
        probs = store[item["id"]].class_probs
        rows = np.arange(len(probs))
        np.testing.assert_array_equal(probs[rows, item["ids"]], item["scores"].astype(np.float16))
        assert np.count_nonzero(probs) == len(probs)


def test_uniter_lmdb_with_image_sizes_and_patterns(tmp_path):
    entries = {f"flickr30k_{item['id']}.npz": as_msgpack(uniter_values(item)) for item in EXAMPLES}
    path = write_lmdb(tmp_path / "feat_numbb36", entries)
    sizes = tmp_path / "sizes.json"
    sizes.write_text(json.dumps({item["id"]: [80, 100] for item in EXAMPLES}))
    arguments = ["--image_id_pattern", r"flickr30k_(.+)\.npz", "--image_sizes", str(sizes)]
    output = str(tmp_path / "store")
    check_store(
        main(["--format", "uniter_lmdb", "--input", str(path), "--output", output, *arguments]),
        tolerance=1e-3,
    )


def test_uniter_lmdb_keeps_the_number_of_regions_in_nbb_json(tmp_path):
    more = {item["id"]: example(number, len(item["ids"]) + 4) for number, item in enumerate(EXAMPLES)}
    path = write_lmdb(
        tmp_path / "feat_th0.2_max100_min10_compressed",
        {f"{key}.npz": as_compressed_npz(uniter_values(item)) for key, item in more.items()},
    )
    counts = tmp_path / "nbb_th0.2_max100_min10.json"
    counts.write_text(json.dumps({"image0.npz": 2, "image1.npz": 3}))
    store = RegionStore(import_regions("uniter_lmdb", [path], tmp_path / "store"))
    assert store.region_counts.tolist() == [2, 3]
    np.testing.assert_array_equal(store["image1"].features, more["image1"]["features"][:3].astype(np.float16))
    counts.write_text(json.dumps({"image0.npz": 2}))
    fails(
        lambda: import_regions("uniter_lmdb", [path], tmp_path / "other"), str(counts), "image1.npz", "None"
    )


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"features": np.array([{}, {}, {}], object)}, ["only numbers"]),
        ({"norm_bb": None}, ["'boxes'", "norm_bb"]),
        ({"norm_bb": np.zeros((3, 5), np.float16)}, ["'normalized_boxes'", "(3, 5)", "4 or 6 or 7"]),
        ({"soft_labels": np.full((3, 1601), np.nan, np.float16)}, ["'class_probs'", "NaN"]),
        ({"soft_labels": np.ones((2, 1601), np.float16)}, ["(2,"]),
    ],
)
def test_malformed_uniter_lmdb(tmp_path, change, parts):
    values = {
        name: value for name, value in (uniter_values(EXAMPLES[0]) | change).items() if value is not None
    }
    path = write_lmdb(tmp_path / "db", {"image0.npz": as_msgpack(values)})
    if "norm_bb" in change and change["norm_bb"] is None:
        parts = ["'image_height'"]  # neither normalised boxes nor a size
    fails(lambda: import_regions("uniter_lmdb", [path], tmp_path / "store"), str(path), "row 1", *parts)
    assert os.listdir(tmp_path) == ["db"]


def test_broken_lmdb(tmp_path):
    garbage = write_lmdb(tmp_path / "garbage", {"image0": b"\xc1 no msgpack"})
    fails(lambda: import_regions("uniter_lmdb", [garbage], tmp_path / "store"), "malformed msgpack")
    fails(lambda: import_regions("volta_lmdb", [garbage], tmp_path / "store"), "malformed pickle")
    cut = write_lmdb(tmp_path / "cut", {item["id"]: as_msgpack(uniter_values(item)) for item in EXAMPLES})
    os.truncate(cut / "data.mdb", 8192)
    fails(lambda: import_regions("uniter_lmdb", [cut], tmp_path / "store"), "8192 bytes")
    (tmp_path / "none").mkdir()
    fails(lambda: import_regions("uniter_lmdb", [tmp_path / "none"], tmp_path / "store"), "LMDB")


# --- VOLTA ---


@pytest.mark.parametrize("protocol", [2, 4])
def test_volta_lmdb_of_tsv_lines(tmp_path, protocol):
    entries = {}
    for item in EXAMPLES:
        cells = {name: value for name, value in tsv_cells(item).items() if name in LXMERT}
        cells = OrderedDict(cells, img_h="80", img_w="100", features=cells["features"].encode())
        entries[item["id"]] = pickle.dumps(cells, protocol)
    entries["keys"] = pickle.dumps([key.encode() for key in entries])
    path = write_lmdb(tmp_path / "db", entries)
    check_store(main(["--format", "volta_lmdb", "--input", str(path), "--output", str(tmp_path / "store")]))


def test_volta_lmdb_of_hdf5_groups_and_class_probabilities(tmp_path):
    entries = {}
    for item in EXAMPLES:
        probs = np.zeros((len(item["ids"]), 1601), np.float32)
        probs[np.arange(len(probs)), item["ids"] + 1] = item["scores"]
        values = {"img_id": item["id"], "img_h": np.int64(80), "img_w": np.int64(100), "boxes": item["boxes"],
                  "features": item["features"], "cls_prob": probs}  # fmt: skip
        entries[item["id"]] = pickle.dumps(values)
    path = write_lmdb(tmp_path / "db", entries)
    store = check_store(import_regions("volta_lmdb", [path], tmp_path / "store"))
    assert store.num_classes == 1600


def test_volta_h5(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        for item in EXAMPLES:
            group = file.create_group(item["id"])
            group["features"], group["boxes"] = item["features"], item["boxes"]
            group["obj_id"], group["obj_conf"] = item["ids"], item["scores"]
            group["img_h"], group["img_w"] = 80, 100
    check_store(
        main(["--format", "volta_h5", "--input", str(tmp_path / "a.h5"), "--output", str(tmp_path / "store")])
    )
    (tmp_path / "bad.h5").write_bytes((tmp_path / "a.h5").read_bytes()[:700])
    fails(lambda: import_regions("volta_h5", [tmp_path / "bad.h5"], tmp_path / "other"), "bad.h5", "HDF5")


# --- one file per image ---


def test_npz_and_npy_per_image(tmp_path):
    directory = tmp_path / "images"
    directory.mkdir()
    first, second = EXAMPLES
    np.savez(
        directory / "image0.npz", x=first["features"], bbox=first["boxes"], image_h=80, image_w=100,
        objects_id=first["ids"], objects_conf=first["scores"], info=np.array([{"an": "object"}], object),
    )  # fmt: skip
    np.save(directory / "image1.npy", second["features"])
    sides = {"boxes": second["boxes"], "image_height": 80, "image_width": 100, "class_ids": second["ids"],
             "class_scores": second["scores"]}  # fmt: skip
    for name, values in sides.items():
        np.save(directory / f"image1_{name}.npy", values)
    check_store(main(["--format", "npz", "--input", str(directory), "--output", str(tmp_path / "store")]))
    (directory / "image2.npz").write_bytes(b"PK no zip")
    fails(lambda: import_regions("npz", [directory], tmp_path / "other"), "image2.npz", "malformed .npz")


# --- nothing is executed ---


class Hostile:
    def __reduce__(self):
        return os.system, ("touch hostile",)


def test_hostile_pickles_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    system = os.system.__module__
    for hostile in (Hostile(), {"features": Hostile()}, [Hostile()]):
        with pytest.raises(DecodingError, match=rf"{system}\.system"):
            loads_pickle(pickle.dumps(hostile))
    path = write_lmdb(tmp_path / "db", {"image0": pickle.dumps(Hostile())})
    fails(lambda: import_regions("volta_lmdb", [path], tmp_path / "store"), "row 1", f"{system}.system")
    with pytest.raises(DecodingError, match="builtins.eval"):
        loads_pickle(pickle.dumps(eval))
    assert not (tmp_path / "hostile").exists()


def test_arrays_of_objects_are_never_unpickled():
    objects = np.array([Hostile()], object)
    with pytest.raises(DecodingError, match="only numbers"):
        loads_msgpack(msgpack.dumps({"a": objects}, default=msgpack_numpy.encode))
    stream = io.BytesIO()
    np.savez(stream, a=objects, b=np.arange(3))
    assert list(loads_npz(stream.getvalue())) == ["b"]
    with pytest.raises(DecodingError):
        loads_pickle(pickle.dumps(objects))


def test_plain_data_is_decoded():
    values = {
        "list": [1, 2.5, None, "text", b"bytes", True],
        "array": np.arange(6, dtype=">f4").reshape(2, 3),
        "fortran": np.asfortranarray(np.arange(6).reshape(2, 3)),
        "scalar": np.float32(1.5),
    }
    for protocol in range(2, 6):
        decoded = loads_pickle(pickle.dumps(values, protocol))
        assert decoded["list"] == values["list"] and decoded["scalar"] == 1.5
        np.testing.assert_array_equal(decoded["array"], values["array"])
        np.testing.assert_array_equal(decoded["fortran"], values["fortran"])
    packed = msgpack.dumps(
        {"array": np.arange(6).reshape(2, 3), "scalar": np.float32(1.5)}, default=msgpack_numpy.encode
    )
    decoded = loads_msgpack(packed)
    assert decoded["array"].tolist() == [[0, 1, 2], [3, 4, 5]] and decoded["scalar"] == 1.5


def test_options_are_checked(tmp_path):
    with pytest.raises(ValueError, match="volta_lmdb"):
        import_regions("hdf", [tmp_path], tmp_path / "store")
    with pytest.raises(ValueError, match="columns"):
        import_regions("npz", [tmp_path], tmp_path / "store", columns=["a"])
    assert set(FORMATS) == {"tsv", "uniter_lmdb", "volta_lmdb", "volta_h5", "npz"}


# --- kills and restarts ---


@pytest.fixture
def twelve(tmp_path) -> list[str]:
    """The command line of an import of twelve images, in shards of three."""
    file = write_tsv_as_others_do(tmp_path / "a.tsv", LXMERT, rows=[tsv_cells(example(n)) for n in range(12)])
    return ["--format", "tsv", "--input", str(file), "--rows_per_shard", "3", "--output"]


def test_stopped_at_every_rename_the_store_is_the_same(twelve, tmp_path, monkeypatch):
    main([*twelve, str(tmp_path / "undisturbed")])
    decoded, decode, output = [], region_import.row_from_record, tmp_path / "store"

    def row_from_record(record, options):
        decoded.append(record.key)
        return decode(record, options)

    def import_again():
        assert not output.exists()
        main([*twelve, str(output)])

    monkeypatch.setattr(region_import, "row_from_record", row_from_record)
    stops = run_stopped_at_every_fifth_rename(monkeypatch, import_again)
    assert stops >= 4
    assert contents(output) == contents(tmp_path / "undisturbed")
    assert sorted(os.listdir(tmp_path)) == ["a.tsv", "store", "undisturbed"]
    assert len(decoded) <= 12 + 3 * stops  # a stop costs the shard under way
    decoded.clear()
    main([*twelve, str(output)])  # is finished
    assert not decoded


def test_another_input_does_not_continue_an_import(twelve, tmp_path):
    main([*twelve, str(tmp_path / "store")])
    write_tsv_as_others_do(tmp_path / "a.tsv", LXMERT)
    with pytest.raises(ValueError, match="begun with other settings: inputs"):
        main([*twelve, str(tmp_path / "store")])
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(OptionError, match="taken"):
        main([*twelve, str(tmp_path / "taken")])


@pytest.mark.parametrize(
    ("cells", "parts"),
    [
        (tsv_cells(example(0)), ["row 4", "'image0'", "image 1 has it"]),
        ({**tsv_cells(example(9)), "features": encoded(np.zeros((3, 4), np.float32))}, ["'feature_size'", "4", "6"]),
    ],
)
def test_what_agrees_within_a_shard_only_is_refused(tmp_path, cells, parts):
    rows = [*(tsv_cells(example(n)) for n in range(3)), cells]
    file = write_tsv_as_others_do(tmp_path / "a.tsv", LXMERT, rows=rows)
    fails(lambda: import_regions("tsv", [file], tmp_path / "store", rows_per_shard=3), str(file), *parts)
    assert os.listdir(tmp_path) == ["a.tsv"]
