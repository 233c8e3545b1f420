"""Region files of any content: sound regions, or a DataError, and nothing else."""

import base64
import io
import itertools
import json
import pickle
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fuzzing import altered, damaged, fuzz, json_values, texts
from hypothesis import given
from hypothesis import strategies as st

from uc2.data_error import DataError
from uc2.region_import import import_regions
from uc2.region_import import main as import_main
from uc2.region_store import RegionRow, RegionStore, write_region_store
from uc2.region_store import main as store_main
from uc2.safe_decoding import DecodingError, loads_msgpack, loads_npz, loads_pickle

lmdb = pytest.importorskip("lmdb")
msgpack = pytest.importorskip("msgpack")
h5py = pytest.importorskip("h5py")

BOXES = np.array([[0, 0, 5, 5], [1, 2, 8, 9]], np.float32)
ARRAYS = {
    "boxes": BOXES,
    "features": np.arange(6, dtype=np.float32).reshape(2, 3),
    "class_ids": np.array([3, 1]),
    "class_scores": np.array([0.9, 0.4], np.float32),
}
SIZES = {"image_height": 10, "image_width": 10}


def rows(count: int = 3) -> list[RegionRow]:
    return [RegionRow(image_id=f"i{number}", **SIZES, **ARRAYS) for number in range(count)]


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A store of two shards."""
    return write_region_store(rows(), tmp_path_factory.mktemp("sound") / "store", rows_per_shard=2)


def check_store(path) -> None:
    """Opens a store and reads all of it; what `validate` finds wrong are DataErrors, too."""
    try:
        store = RegionStore(path)
    except DataError as error:
        assert "expected" in str(error)
        return
    assert all(isinstance(error, DataError) for error in store.validate())
    for row in store.values():
        assert row.features.shape == (len(row.boxes), store.feature_size)


@pytest.mark.parametrize("name", ["store.json", "shard-00000.arrow"])
@fuzz
@given(data=st.data())
def test_damaged_stores(tmp_path, sound, name, data):
    path = tmp_path / "store"
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(sound, path)
    content = (path / name).read_bytes()
    (path / name).write_bytes(data.draw(damaged(content) | st.binary(max_size=40)))
    check_store(path)
    if name != "store.json":  # as if the list of shards had been made of the damaged file
        manifest = json.loads((path / "store.json").read_text())
        manifest["shards"][0]["bytes"] = (path / name).stat().st_size
        (path / "store.json").write_text(json.dumps(manifest))
        check_store(path)


@fuzz
@given(data=st.data())
def test_altered_manifests(tmp_path, sound, data):
    path = tmp_path / "store"
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(sound, path)
    manifest = json.loads((path / "store.json").read_text())
    if data.draw(st.booleans()):
        manifest = data.draw(altered(manifest) | json_values)
    else:
        manifest["shards"][0] = data.draw(altered(manifest["shards"][0]) | json_values)
    (path / "store.json").write_text(json.dumps(manifest))
    check_store(path)


def test_shards_that_are_not_there(tmp_path, sound):
    for number, change in enumerate(["missing", "folder", "outside"]):
        path = tmp_path / str(number)
        shutil.copytree(sound, path)
        if change == "outside":
            manifest = json.loads((path / "store.json").read_text())
            manifest["shards"][0]["file"] = "../nowhere.arrow"
            (path / "store.json").write_text(json.dumps(manifest))
        else:
            (path / "shard-00001.arrow").unlink()
        if change == "folder":
            (path / "shard-00001.arrow").mkdir()
        with pytest.raises(DataError, match="no such file"):
            RegionStore(path)


def cells() -> dict:
    """A row as Parquet holds it."""
    lists = {name: ARRAYS[name].tolist() for name in ("boxes", "class_ids", "class_scores")}
    return {"image_id": "a", **SIZES, **lists, "features": ARRAYS["features"].astype("<f2").tobytes()}


@pytest.mark.parametrize("ending", [".parquet", ".arrow"])
@fuzz
@given(data=st.data())
def test_tables(tmp_path, ending, data):
    """Columns of other types and names, and damaged files."""
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    path = tmp_path / f"regions{ending}"
    values = data.draw(altered(cells()) | st.just(cells()))
    try:
        table = pa.table({name: [value] for name, value in values.items()})
    except (pa.ArrowException, OverflowError, UnicodeEncodeError):
        return  # nobody can write such a table
    if ending == ".parquet":
        try:
            pq.write_table(table, path)
        except pa.ArrowException:
            return
    else:
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
    if data.draw(st.booleans()):
        path.write_bytes(data.draw(damaged(path.read_bytes()) | st.binary(max_size=40)))
    check_store(path)


NUMBER = itertools.count()


def check_import(tmp_path, format: str, path) -> None:
    """Imports the file or database; either a sound store or one error."""
    output = tmp_path / f"store{next(NUMBER)}"
    try:
        import_regions(format, [path], output)
    except DataError as error:
        assert "expected" in str(error)
        assert not output.exists()
        return
    assert RegionStore(output).validate() == []


def tsv_line() -> bytes:
    encoded = {name: base64.b64encode(array.tobytes()).decode() for name, array in ARRAYS.items()}
    classes = [encoded["class_ids"], encoded["class_scores"]]
    return "\t".join(["a", "10", "10", *classes, "", "", "2", encoded["boxes"], encoded["features"]]).encode()


@fuzz
@given(data=st.data())
def test_tsv(tmp_path, data):
    columns = tsv_line().split(b"\t")
    for place in data.draw(st.lists(st.integers(0, 9), max_size=2)):
        number = st.sampled_from([b"0", b"-1", b"nan", b"1e9", b"9" * 5000, b"2.0", "２".encode()])
        columns[place] = data.draw(number | st.binary(max_size=12) | damaged(columns[place] or b"a"))
    content = b"\t".join(columns)
    path = tmp_path / "regions.tsv"
    path.write_bytes(data.draw(st.just(content) | damaged(content) | st.binary(max_size=40)))
    check_import(tmp_path, "tsv", path)


plain_arrays = st.sampled_from(
    [
        *ARRAYS.values(),
        np.array(["a", "b"]),
        np.zeros((0, 4), np.float32),
        np.float32(3),
        np.full((2, 3), np.nan),
        np.full((2, 4), 1e30),
        np.zeros((2, 2, 2)),
        np.array([True, False]),
        np.array([1j, 2]),
        np.array(["2020-01-01"] * 2, "M8[D]"),
    ]
)


def packed(values: dict) -> bytes:
    """As msgpack-numpy writes arrays."""

    def as_map(value):
        array = np.asarray(value)
        kind = array.dtype.str.encode()
        return {b"nd": True, b"type": kind, b"kind": b"", b"shape": array.shape, b"data": array.tobytes()}

    arrays = {name: value for name, value in values.items() if isinstance(value, np.ndarray | np.generic)}
    return msgpack.packb({**values, **{name: as_map(array) for name, array in arrays.items()}})


@pytest.mark.parametrize("format", ["uniter_lmdb", "volta_lmdb"])
@fuzz
@given(data=st.data())
def test_lmdb_values(tmp_path, format, data):
    values = {**ARRAYS, **SIZES}
    for name in data.draw(st.lists(st.sampled_from([*values, "num_boxes"]), max_size=2)):
        values[name] = data.draw(plain_arrays | st.integers(-(2**40), 2**40) | st.text("ab", max_size=3) | st.none())
    content = pickle.dumps(values) if format == "volta_lmdb" else packed(values)
    content = data.draw(st.just(content) | damaged(content) | st.binary(max_size=40))
    path = tmp_path / f"database{next(NUMBER)}"
    with lmdb.open(str(path), map_size=1 << 20) as database, database.begin(write=True) as transaction:
        transaction.put(data.draw(st.sampled_from([b"a", b"a.npz", b"\xff", b"__keys__"])), content)
    check_import(tmp_path, format, path)


@fuzz
@given(data=st.data())
def test_lmdb_files(tmp_path, data):
    """What is no database at all, or cut off; pages changed inside are LMDB's own to trust."""
    path = tmp_path / f"database{next(NUMBER)}"
    path.mkdir()
    (path / "data.mdb").write_bytes(data.draw(st.binary(max_size=9000)))
    check_import(tmp_path, "uniter_lmdb", path)


@fuzz
@given(data=st.data())
def test_hdf5(tmp_path, data):
    path = tmp_path / f"regions{next(NUMBER)}.h5"
    values = {**ARRAYS, **SIZES}
    for name in data.draw(st.lists(st.sampled_from(list(values)), max_size=2)):
        values[name] = data.draw(st.sampled_from(["text", b"bytes", np.zeros((2, 2, 2)), np.nan, h5py.Empty("f")]))
    with h5py.File(path, "w") as file:
        group = file.create_group("a")
        for name, value in values.items():
            group[name] = value
        if data.draw(st.booleans()):
            group.create_group("boxes_again")
    if data.draw(st.booleans()):
        path.write_bytes(data.draw(damaged(path.read_bytes()) | st.binary(max_size=40)))
    check_import(tmp_path, "volta_h5", path)


def npz(values: dict) -> bytes:
    stream = io.BytesIO()
    np.savez(stream, **values)
    return stream.getvalue()


@pytest.mark.parametrize("ending", [".npz", ".npy"])
@fuzz
@given(data=st.data())
def test_numpy_files(tmp_path, ending, data):
    folder = tmp_path / str(next(NUMBER))
    folder.mkdir()
    values = {**ARRAYS, **SIZES}
    for name in data.draw(st.lists(st.sampled_from(list(values)), max_size=2)):
        values[name] = data.draw(plain_arrays | st.just(np.array([{}, 1], dtype=object)))
    if ending == ".npz":
        content = npz(values)
    else:
        for name, value in values.items():
            np.save(folder / ("a.npy" if name == "features" else f"a_{name}.npy"), value)
        content = (folder / "a.npy").read_bytes()
    (folder / f"a{ending}").write_bytes(data.draw(st.just(content) | damaged(content) | st.binary(max_size=40)))
    check_import(tmp_path, "npz", folder)


@pytest.mark.parametrize("decode", [loads_msgpack, loads_npz, loads_pickle])
@fuzz
@given(data=st.data())
def test_decoders(decode, data):
    sound = {loads_msgpack: packed, loads_npz: npz, loads_pickle: pickle.dumps}[decode]({**ARRAYS, **SIZES})
    try:
        decode(data.draw(damaged(sound) | st.binary(max_size=60)))
    except DecodingError:
        pass


@fuzz
@given(data=st.data())
def test_image_sizes(tmp_path, data):
    """The side file of an import."""
    path, table = tmp_path / "sizes.json", tmp_path / "regions.tsv"
    table.write_bytes(tsv_line())
    values = data.draw(st.dictionaries(texts, json_values, max_size=2) | json_values)
    path.write_text(json.dumps(values))
    output = tmp_path / f"store{next(NUMBER)}"
    words = ["--input", str(table), "--output", str(output), "--image_sizes", str(path)]
    try:
        import_main(words)
    except DataError as error:
        assert "sizes.json" in str(error)


def test_a_flipped_bit_is_found(tmp_path, sound, capsys):
    """In a feature, where every value is a possible one."""
    path = tmp_path / "store"
    shutil.copytree(sound, path)
    shard = path / "shard-00000.arrow"
    content = bytearray(shard.read_bytes())
    place = content.index(ARRAYS["features"].astype("<f2").tobytes())
    content[place + 2] ^= 1
    shard.write_bytes(content)
    (error,) = RegionStore(path).validate()
    assert "shard-00000.arrow: found checksum" in str(error)
    assert store_main([str(path)]) == 1 and "checksum" in capsys.readouterr().out
    assert store_main([str(sound)]) == 0
