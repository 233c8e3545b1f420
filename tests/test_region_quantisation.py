"""Region stores with smaller columns: what is kept, against plain computations, and restarts."""

import numpy as np
import pytest
from interruptions import run_stopped_at_every_fifth_rename

from uc2.data_error import DataError, OptionError
from uc2.region_codecs import Float16, Int8, ProductQuantised, TopClasses
from uc2.region_quantisation import learn_codebook, main
from uc2.region_store import RegionRow, RegionStore, write_region_store

WIDTH, CLASSES = 24, 30


def make_row(number: int, count: int = 12) -> RegionRow:
    rng = np.random.default_rng(number)
    corners = rng.uniform(0, 40, (count, 2)).astype(np.float32)
    probs = rng.dirichlet(np.full(CLASSES, 0.1), count).astype(np.float16)
    return RegionRow(
        image_id=f"image{number}",
        image_height=100,
        image_width=100,
        boxes=np.concatenate([corners, corners + 30], axis=1),
        features=(rng.normal(size=(count, WIDTH)) * rng.uniform(0.1, 10, (count, 1))).astype(np.float16),
        class_ids=probs.argmax(axis=1),
        class_scores=np.linspace(0.9, 0.3, count).astype(np.float32),
        class_probs=probs,
    )


ROWS = [make_row(number) for number in range(40)]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_region_store(ROWS, tmp_path_factory.mktemp("regions") / "store")


def quantised(path, output, *options) -> RegionStore:
    main(["--input", str(path), "--output", str(output), *map(str, options)])
    return RegionStore(output)


def same_but(store, *changed: str) -> None:
    """All else is untouched."""
    assert list(store) == [row.image_id for row in ROWS] and store.validate() == []
    fields = {"boxes", "features", "class_ids", "class_scores", "class_probs"} - set(changed)
    for row in ROWS:
        for field in fields:
            np.testing.assert_array_equal(getattr(store[row.image_id], field), getattr(row, field))


def test_float16_is_a_view():
    values = np.ones((2, 3), np.float16)
    assert Float16(3).encode(values) is values and Float16(3).decode(values) is values


def test_int8_by_hand():
    """-1 to 1 in 255 steps: 0 lies between steps 127 and 128."""
    values = np.array([[-1, 0, 1, 0.5], [3, 3, 3, 3]], np.float16)
    rows = Int8(4).encode(values)
    assert rows.dtype == np.uint8 and rows.shape == (2, 12)
    assert rows[:, 8:].tolist() == [[0, 128, 255, 191], [0, 0, 0, 0]]
    np.testing.assert_allclose(Int8(4).decode(rows), [[-1, 1 / 255, 1, 127 / 255], [3, 3, 3, 3]], atol=1e-3)


def test_int8_is_within_half_a_step(path, tmp_path):
    store = quantised(path, tmp_path / "int8", "--features", "int8")
    same_but(store, "features")
    for row in ROWS:
        half_step = (np.ptp(row.features.astype(np.float32), axis=1, keepdims=True)) / 510
        error = np.abs(store[row.image_id].features.astype(np.float32) - row.features)
        assert (error <= half_step + 2**-11 * np.abs(row.features)).all()  # and the rounding to float16


def test_a_code_is_the_nearest_centroid():
    rng = np.random.default_rng(0)
    codec = ProductQuantised(rng.normal(size=(2, 256, 3)).astype(np.float16))
    values = rng.normal(size=(7, 6)).astype(np.float16)
    codes = codec.encode(values)
    for row, code in zip(values.astype(np.float64), codes, strict=True):
        distances = ((row.reshape(2, 1, 3) - codec.codebook.astype(np.float64)) ** 2).sum(axis=2)
        assert code.tolist() == distances.argmin(axis=1).tolist()
    decoded = codec.decode(codes)
    assert decoded.dtype == np.float16
    assert decoded[4, 3:].tolist() == codec.codebook[1, codes[4, 1]].tolist()


def test_k_means_ends_where_every_centroid_is_the_mean_of_its_points(path):
    features = np.concatenate([row.features for row in ROWS]).astype(np.float64)  # 480 of them
    codebook = learn_codebook(RegionStore(path), 2, sample=480, iterations=60).astype(np.float64)
    assert codebook.shape == (WIDTH // 2, 256, 2)
    for group in (0, 7):
        points = features[:, 2 * group : 2 * group + 2]
        nearest = ((points[:, None] - codebook[group]) ** 2).sum(axis=2).argmin(axis=1)
        assert len(set(nearest)) > 200
        for number in set(nearest):
            mean = points[nearest == number].mean(axis=0)
            np.testing.assert_allclose(codebook[group, number], mean, rtol=2e-3, atol=1e-3)


def test_finer_groups_err_less_and_a_codebook_can_be_taken_over(path, tmp_path):
    errors = []
    for size in (2, 4, 8):
        store = quantised(path, tmp_path / f"pq{size}", "--features", "pq", "--group_size", size, "--sample", 400)
        same_but(store, "features")
        pairs = [(store[row.image_id].features.astype(np.float32), row.features) for row in ROWS]
        errors.append(sum(((found - wanted) ** 2).sum() for found, wanted in pairs))
    energy = sum((row.features.astype(np.float32) ** 2).sum() for row in ROWS)
    assert 0 < errors[0] < errors[1] < errors[2] < energy
    again = quantised(path, tmp_path / "again", "--features", "pq", "--codebook", tmp_path / "pq4")
    np.testing.assert_array_equal(again["image3"].features, RegionStore(tmp_path / "pq4")["image3"].features)


def test_the_largest_class_probabilities_stay(path, tmp_path):
    store = quantised(path, tmp_path / "top", "--top_classes", 3)
    same_but(store, "class_probs")
    for row in ROWS:
        expected = row.class_probs.copy()
        for region in expected:
            region[np.argsort(-region, kind="stable")[3:]] = 0
        np.testing.assert_array_equal(store[row.image_id].class_probs, expected)
    both = quantised(path, tmp_path / "both", "--top_classes", 3, "--features", "int8")
    same_but(both, "class_probs", "features")
    assert both.paths[0].stat() and (both.num_classes, both.feature_size) == (CLASSES, WIDTH)


def test_stopped_at_every_rename_the_copy_is_the_same(path, tmp_path, monkeypatch):
    options = ["--features", "pq", "--sample", "300", "--iterations", "2", "--rows_per_shard", "10"]
    quantised(path, tmp_path / "undisturbed", *options)
    stops = run_stopped_at_every_fifth_rename(monkeypatch, lambda: quantised(path, tmp_path / "copy", *options))
    assert stops >= 3
    for file in (tmp_path / "undisturbed").iterdir():
        assert file.read_bytes() == (tmp_path / "copy" / file.name).read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "nothing to do"),
        (["--features", "pq", "--group_size", 7], "does not divide the features' width 24"),
        (["--top_classes", 31], "probabilities of 30 classes"),
    ],
)
def test_options_that_cannot_be(path, tmp_path, options, message):
    with pytest.raises(OptionError, match=message):
        quantised(path, tmp_path / "copy", *options)


def test_damaged_copies(path, tmp_path):
    quantised(path, tmp_path / "pq", "--features", "pq", "--sample", 300, "--iterations", 1)
    np.save(tmp_path / "pq" / "codebook.npy", np.zeros((2, 256, 5), np.float16))
    with pytest.raises(DataError, match=r"codebook.npy: found numbers of shape \(2, 256, 5\)"):
        RegionStore(tmp_path / "pq")
    (tmp_path / "pq" / "codebook.npy").unlink()
    with pytest.raises(DataError, match="codebook.npy"):
        RegionStore(tmp_path / "pq")
    manifest = tmp_path / "pq" / "store.json"
    manifest.write_text(manifest.read_text().replace('"pq"', '"zip"'))
    with pytest.raises(DataError, match="'encodings.features': found .*zip"):
        RegionStore(tmp_path / "pq")
    with pytest.raises(DataError, match="found class 9"):
        TopClasses(8, 1).decode(np.array([[9, 0]], np.uint16))
