"""`prepare_corpus.py regions`: every source, reports, kills at any moment, several processes."""

import io
import json
import multiprocessing
import os
import random
import signal
import tarfile
import time
from functools import partial

import datasets
import numpy as np
import pytest
import timm
import torch
from folder_contents import contents
from PIL import Image
from timm.models import save_for_hf

from modeling_uc2.configuration_uc2_detector import UC2RegionDetectorConfig
from modeling_uc2.modeling_uc2_detector import UC2RegionDetector
from processing_uc2.image_processing_uc2_detector import UC2DetectorImageProcessor
from uc2 import region_extraction
from uc2.data_error import DataError, OptionError
from uc2.image_sources import open_images
from uc2.region_extraction import main, regions_from_images
from uc2.region_extractors import GridFeatures
from uc2.region_store import RegionStore

NUM_IMAGES, BATCH_SIZE = 23, 3
SETTINGS = ["--batch_size", str(BATCH_SIZE), "--images_per_shard", "8", "--num_workers", "2"]
BROKEN = {"broken.jpg": b"\xff\xd8\xff\xe0 cut off", "letters/notes.png": b"not an image"}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Threads of torch do not survive a fork, which the tests below use to start processes quickly."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def encode(image, format):
    buffer = io.BytesIO()
    image.save(buffer, format)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def photographs():
    """Image id -> photograph; ids sort as they are listed."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(20, 50, (NUM_IMAGES, 2))
    return {
        f"{number:03d}": Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8))
        for number, size in enumerate(sizes)
    }


@pytest.fixture(scope="module")
def folder(photographs, tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    for image_id, image in photographs.items():
        (root / f"{image_id}.png").write_bytes(encode(image, "PNG"))
    (root / "letters").mkdir()
    for name, content in BROKEN.items():
        (root / name).write_bytes(content)
    (root / "captions.txt").write_text("no image, and not taken for one")
    return root


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """The name of a tiny timm model with saved random weights."""
    torch.manual_seed(0)
    model = timm.create_model("test_resnet.r160_in1k", num_classes=0)
    path = tmp_path_factory.mktemp("backbone")
    save_for_hf(model, str(path), safe_serialization=True)
    return f"local-dir:{path}"


def arguments(images, output, backbone, *more):
    return [
        "--images",
        str(images),
        "--output",
        str(output),
        "--backbone",
        backbone,
        "--grid",
        "2",
        *SETTINGS,
        *more,
    ]


@pytest.fixture(scope="module")
def undisturbed(folder, backbone, tmp_path_factory):
    output = tmp_path_factory.mktemp("undisturbed") / "store"
    main(arguments(folder, output, backbone))
    return output


# --- what is in the store ---


def test_grid_regions(undisturbed, photographs, backbone):
    store = RegionStore(undisturbed)
    assert list(store) == sorted(photographs)
    assert store.validate() == []
    assert store.feature_size == GridFeatures(backbone, 2).model.num_features
    row, image = store["004"], photographs["004"]
    assert (row.image_width, row.image_height) == image.size
    x, y = image.width / 2, image.height / 2
    cells = [[0, 0, x, y], [x, 0, 2 * x, y], [0, y, x, 2 * y], [x, y, 2 * x, 2 * y]]
    np.testing.assert_allclose(row.boxes, cells, rtol=1e-6)


def test_a_cell_has_the_features_of_its_part_of_the_image(backbone):
    """With a "backbone" that gives back the pixels, a cell's feature is its mean colour, normalised."""
    extractor = GridFeatures(backbone, 2)
    mean, std = extractor.mean, extractor.std

    class Pixels:
        def forward_intermediates(self, pixels, **_):
            return (pixels,)

    extractor.model = Pixels()
    colours = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [51, 102, 153]]], np.uint8)
    image = Image.fromarray(colours.repeat(80, axis=0).repeat(80, axis=1))  # a quarter each, of 160 x 160
    (row,) = extractor([image], ["0"])
    np.testing.assert_allclose(row.features, (colours.reshape(4, 3) / 255 - mean) / std, atol=0.05)


def test_a_grid_finer_than_the_feature_map_is_refused(backbone, photographs):
    with pytest.raises(ValueError, match="--grid 6.*5 x 5"):
        GridFeatures(backbone, 6)([photographs["000"]], ["000"])


def test_images_that_cannot_be_read_are_reported(undisturbed):
    lines = [json.loads(line) for line in (undisturbed / "skipped.jsonl").read_text().splitlines()]
    assert [line["file"] for line in lines] == sorted(BROKEN)
    assert [line["image_id"] for line in lines] == ["broken", "letters/notes"]
    assert lines[0]["reason"] == "OSError: Truncated File Read"
    assert lines[1]["reason"] == "ValueError: no image format is recognised in these 12 bytes"


def test_tar_files_and_data_sets_give_the_same_rows(undisturbed, photographs, backbone, tmp_path):
    ids = list(photographs)
    for name, members in (("a.tar", ids[:10]), ("b.tar", ids[10:])):
        with tarfile.open(tmp_path / name, "w") as archive:
            for image_id in members:
                for ending, content in (("png", encode(photographs[image_id], "PNG")), ("txt", b"a caption")):
                    member = tarfile.TarInfo(f"{image_id}.{ending}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    rows = {"image_id": ids, "image": list(photographs.values()), "caption": ids}
    features = datasets.Features(
        image_id=datasets.Value("string"), image=datasets.Image(), caption=datasets.Value("string")
    )
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "dataset")
    expected = RegionStore(undisturbed)
    for source in (tmp_path / "*.tar", tmp_path / "dataset"):
        main(arguments(source, tmp_path / f"store-{source.name[-3:]}", backbone))
        store = RegionStore(tmp_path / f"store-{source.name[-3:]}")
        assert list(store) == ids
        for image_id in ids:
            np.testing.assert_allclose(store[image_id].features, expected[image_id].features, atol=1e-2)


def test_a_data_set_of_the_hub_is_streamed(undisturbed, photographs, backbone, tmp_path, monkeypatch):
    features = datasets.Features(image_id=datasets.Value("string"), image=datasets.Image())
    rows = {"image_id": list(photographs), "image": list(photographs.values())}
    stream = datasets.Dataset.from_dict(rows, features=features).to_iterable_dataset()

    def load_dataset(name, split, streaming):
        assert (name, split, streaming) == ("owner/name", "validation", True)
        return stream

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    main(arguments("owner/name", tmp_path / "store", backbone, "--split", "validation"))
    store = RegionStore(tmp_path / "store")
    assert list(store) == list(photographs)
    np.testing.assert_allclose(store["007"].features, RegionStore(undisturbed)["007"].features, atol=1e-2)


def test_photographs_are_turned_upright(tmp_path, backbone):
    image = Image.new("RGB", (40, 20))
    exif = image.getexif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    (tmp_path / "images").mkdir()
    image.save(tmp_path / "images" / "a.jpg", exif=exif)
    main(arguments(tmp_path / "images", tmp_path / "store", backbone))
    row = RegionStore(tmp_path / "store")["a"]
    assert (row.image_width, row.image_height) == (20, 40)


@pytest.fixture(scope="module")
def detector():
    torch.manual_seed(0)
    config = UC2RegionDetectorConfig(
        depths=[1, 1, 1, 1], widths=[4, 4, 8, 8], num_classes=7, num_attributes=5, proposal_hidden_size=8
    )
    model = UC2RegionDetector(config).eval()
    model.backbone.conv1.weight.data /= (
        60  # random weights on values of 0 to 255 would throw all boxes outside
    )
    return model


def test_images_of_every_kind_are_read_as_8_bit_rgb(tmp_path):
    grey = np.arange(0, 256, 16, dtype=np.uint8).reshape(4, 4)
    expected = np.repeat(grey[:, :, None], 3, axis=2)
    deep = Image.fromarray((grey.astype(np.uint16) << 8) + 77)
    kinds = {"deep.png": deep, "L.png": Image.fromarray(grey), "RGBA.png": Image.fromarray(expected).convert("RGBA")}
    kinds["CMYK.tiff"] = Image.fromarray(expected).convert("CMYK")
    for name, image in kinds.items():
        image.save(tmp_path / name)
    (unit,) = open_images([str(tmp_path)])
    for item in unit.items():
        image = item.decode()
        assert image.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(image), expected, err_msg=item.name)


def test_detector_regions(detector, folder, photographs, tmp_path):
    detector.save_pretrained(tmp_path / "detector")
    sizes = ["--shortest_edge", "64", "--longest_edge", "99", "--min_regions", "2", "--max_regions", "6"]
    source = ["--images", str(folder), "--output", str(tmp_path / "store"), "--class_probs", "true"]
    main([*source, "--detector", str(tmp_path / "detector"), *sizes, *SETTINGS])
    store = RegionStore(tmp_path / "store")
    assert store.validate() == [] and store.feature_size == 32 and store.num_classes == 7
    processor = UC2DetectorImageProcessor(size={"shortest_edge": 64, "longest_edge": 99})
    for image_id in ("000", "022"):
        (alone,) = regions_from_images(
            detector,
            [photographs[image_id]],
            image_processor=processor,
            image_ids=[image_id],
            min_detections=2,
            max_detections=6,
        )
        row = store[image_id]
        assert 2 <= len(row.boxes) <= 6
        np.testing.assert_allclose(row.boxes, alone.boxes, atol=0.01)
        np.testing.assert_allclose(row.features, alone.features, rtol=0.01, atol=0.01)
        assert row.class_ids.tolist() == alone.class_ids.tolist()
        assert row.class_probs.argmax(1).tolist() == row.class_ids.tolist()


def test_regions_of_images_in_memory(detector, photographs):
    images = list(photographs.values())[:2]
    processor = UC2DetectorImageProcessor(size={"shortest_edge": 64, "longest_edge": 99})
    rows = regions_from_images(detector, images, image_processor=processor, max_detections=12)
    assert [row.image_id for row in rows] == ["0", "1"]
    assert all(len(row.boxes) <= 12 and row.features.dtype == np.float16 for row in rows)


# --- interruptions ---


def run_forked(argv, before=None):
    """Starts `main(argv)` in a process of its own, after `before()`."""

    def run():
        if before is not None:
            before()
        main(argv)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process


def test_killed_at_every_rename_the_store_is_the_same(undisturbed, folder, backbone, tmp_path, monkeypatch):
    """Each process dies at its n-th rename, half of them before and half after it, n = 1, 2, …, 5, 1, …."""
    output = tmp_path / "store"
    log = tmp_path / "computed.txt"
    extract = region_extraction.extract_batch

    def logged(extractor, images):
        result = extract(extractor, images)
        with open(log, "a") as stream:
            stream.writelines(f"{item.image_id}\n" for item, _ in images)
        return result

    monkeypatch.setattr(region_extraction, "extract_batch", logged)
    kills, rename = 0, os.replace

    def arm(count, after):
        left = [count]

        def replace(source, target):
            left[0] -= 1
            if left[0] == 0 and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            rename(source, target)
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

        monkeypatch.setattr(os, "replace", replace)

    while True:
        process = run_forked(arguments(folder, output, backbone), partial(arm, 1 + kills % 5, kills % 2 == 0))
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        kills += 1
        assert kills < 100
    assert kills > 8
    assert contents(output) == contents(undisturbed)
    assert not output.with_name("store.partial").exists()
    computed = log.read_text().split()
    assert set(computed) == set(RegionStore(undisturbed))
    # A kill loses the batch under way, nothing else.
    assert len(computed) <= NUM_IMAGES + kills * BATCH_SIZE


def test_killed_at_random_moments_the_store_is_the_same(undisturbed, folder, backbone, tmp_path):
    output, rng = tmp_path / "store", random.Random(0)
    for _ in range(6):
        process = run_forked(arguments(folder, output, backbone))
        time.sleep(rng.uniform(0.05, 0.6))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert not output.exists() or contents(output) == contents(undisturbed)
    main(arguments(folder, output, backbone))
    assert contents(output) == contents(undisturbed)


def test_a_finished_store_is_left_alone(undisturbed, folder, backbone, monkeypatch):
    before = contents(undisturbed)
    monkeypatch.setattr(region_extraction, "make_extractor", None)  # would fail if it were called
    main(arguments(folder, undisturbed, backbone))
    assert contents(undisturbed) == before


def test_other_settings_do_not_continue_a_store(undisturbed, folder, backbone, tmp_path):
    with pytest.raises(ValueError, match="grid was 2 and is now 3"):
        main([*arguments(folder, undisturbed, backbone), "--grid", "3"])
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OptionError, match="choose another place"):
        main(arguments(folder, tmp_path, backbone))


# --- several processes ---


def test_two_processes_write_the_same_store(undisturbed, folder, backbone, tmp_path):
    main(arguments(folder, tmp_path / "store", backbone, "--num_processes", "2"))
    assert contents(tmp_path / "store") == contents(undisturbed)


def test_launched_processes_write_the_same_store(undisturbed, folder, backbone, tmp_path):
    """As `accelerate launch` starts them, on one host or several."""
    processes = [
        run_forked(
            arguments(folder, tmp_path / "store", backbone),
            lambda rank=rank: os.environ.update(RANK=str(rank), WORLD_SIZE="3", LOCAL_RANK="0"),
        )
        for rank in (2, 0, 1)
    ]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert contents(tmp_path / "store") == contents(undisturbed)


# --- what is refused ---


def test_sources_that_cannot_be_used(backbone, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no image"):
        main(arguments(tmp_path / "empty", tmp_path / "store", backbone))
    for name in ("a.png", "a.jpg"):
        (tmp_path / "empty" / name).write_bytes(b"")
    with pytest.raises(DataError, match="a.png.*taken"):
        main(arguments(tmp_path / "empty", tmp_path / "store", backbone))
    (tmp_path / "empty" / "a.jpg").unlink()
    with pytest.raises(DataError, match="every image skipped"):
        main(arguments(tmp_path / "empty", tmp_path / "store", backbone))
    features = datasets.Features(image_id=datasets.Value("string"), image=datasets.Image())
    rows = {"image_id": ["a", "b", "a"], "image": [Image.new("RGB", (9, 9))] * 3}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "twice")
    with pytest.raises(DataError, match="'image_id': found 'a'"):
        main(arguments(tmp_path / "twice", tmp_path / "store", backbone))
    with pytest.raises(DataError, match="no such file"):
        main(arguments(tmp_path / "none.tar", tmp_path / "store", backbone))


def test_detector_or_backbone(folder, tmp_path):
    with pytest.raises(ValueError, match="either --detector or --backbone"):
        main(["--images", str(folder), "--output", str(tmp_path / "store")])
