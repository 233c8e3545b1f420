"""Retrieval data: training groups of one true and several wrong pairs, and test sets (UC2, sections 4 and
A.1)."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import datasets
import numpy as np
import torch

from uc2.data_error import DataError, Found
from uc2.region_rows import check_region_row
from uc2.rows import check_images_in_store, load_captions

# Draws per negative before all rows are looked through; each draw fails only for pairs that match.
MAX_TRIES = 50
# Minings whose negatives can still be asked for: batches are built ahead of the training that mines.
KEPT_MININGS = 3


class RetrievalDataset:
    """Groups for fine-tuning: `dataset[key]` is `[true pair, wrong images …, wrong captions …]`.

    `key = epoch * len(dataset) + row`; what is drawn depends on (seed, key) only, so that resumed and
    multi-process runs see the same stream. Wrong images and captions are drawn evenly from those that match
    the true pair in no language: a wrong caption (in the language of the true one) belongs to another image
    and reads differently, a wrong image has no caption that reads like the true one.

    Args:
        captions: rows with `image_id`, `language`, `caption`.
        store: mapping from image id to region row.
        processor: a UC2Processor; its tokenizer makes `input_ids`, its `encode_regions` the regions.
        num_negative_images, num_negative_captions: wrong pairs per true pair; the paper has one of each
        (A.1).
        seed: of every draw.
        max_length: longest caption in tokens, longer ones are cut.
    Raises:
        DataError: if there is no wrong image or caption to draw for a row.
    """

    def __init__(
        self,
        captions: datasets.Dataset,
        store: Mapping,
        processor,
        *,
        num_negative_images: int = 1,
        num_negative_captions: int = 1,
        seed: int = 0,
        max_length: int = 512,
    ):
        if (
            min(num_negative_images, num_negative_captions) < 0
            or num_negative_images + num_negative_captions < 1
        ):
            raise ValueError(
                "the numbers of negative images and captions must not be negative and not both 0, found "
                f"{num_negative_images} and {num_negative_captions}"
            )
        self.captions, self.store, self.processor = captions, store, processor
        self.num_negative_images, self.num_negative_captions = num_negative_images, num_negative_captions
        self.seed, self.max_length = seed, max_length
        self.image_ids, self.image_of_row = _numbered(captions["image_id"])
        _, self.text_of_row = _numbered(map(_as_read, captions["caption"]))
        self.languages, self.language_of_row = _numbered(captions["language"])
        self.rows_of_language = [
            np.flatnonzero(self.language_of_row == number) for number in range(len(self.languages))
        ]
        self.images_of_shared_text = _images_of_shared_texts(self.text_of_row, self.image_of_row)
        # -1: not mined. In shared memory, so that running DataLoader workers see what is mined.
        self.hard_images = torch.full((len(self), num_negative_images), -1).share_memory_()
        self.hard_rows = torch.full((len(self), num_negative_captions), -1).share_memory_()
        self.mined_images = self.hard_images.repeat(KEPT_MININGS, 1, 1).share_memory_()
        self.mined_rows = self.hard_rows.repeat(KEPT_MININGS, 1, 1).share_memory_()
        self._check_candidates()

    def __len__(self) -> int:
        return len(self.captions)

    @property
    def group_size(self) -> int:
        return 1 + self.num_negative_images + self.num_negative_captions

    def __getitem__(self, key: int | tuple[int, int]) -> list[dict[str, np.ndarray]]:
        """The encoded pairs, each with `input_ids (l,)`, `region_features (n, F)`, `region_boxes (n, 4)` and
        `example_id`, the index of its image in `image_ids`. A key may come with the number of a mining."""
        key, mining = key if isinstance(key, tuple) else (key, None)
        row = int(key) % len(self)
        images, rows = self.draw_negatives(int(key), mining)
        text, regions = self._encode_text(row), self._encode_image(self.image_of_row[row])
        group = [text | regions]
        group += [text | self._encode_image(image) for image in images]
        group += [self._encode_text(other) | regions for other in rows]
        return group

    def draw_negatives(self, key: int, mining: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Wrong images (indices into `image_ids`) and rows of wrong captions; mined ones come first.

        Args:
            mining: which mining's; None for what is set now.
        """
        rng = np.random.default_rng((self.seed, key))
        row = key % len(self)
        hard_images, hard_rows = self.hard_images, self.hard_rows
        if mining is not None:
            hard_images, hard_rows = (table[mining % KEPT_MININGS] for table in (self.mined_images, self.mined_rows))
        images = _draw(
            rng,
            np.arange(len(self.image_ids)),
            partial(self.is_wrong_image, row),
            hard_images[row],
            self.num_negative_images,
        )
        rows = _draw(
            rng,
            self.rows_of_language[self.language_of_row[row]],
            partial(self.is_wrong_caption, row),
            hard_rows[row],
            self.num_negative_captions,
        )
        return images, rows

    def is_wrong_image(self, row: int, image: int) -> bool:
        """Whether the row's caption describes another image, in every language."""
        own = self.image_of_row[row] == image
        return not (own or image in self.images_of_shared_text.get(self.text_of_row[row], ()))

    def is_wrong_caption(self, row: int, other: int) -> bool:
        """Whether `other` is in the language of `row` and its caption describes another image."""
        same_language = self.language_of_row[row] == self.language_of_row[other]
        return bool(same_language) and self.is_wrong_image(other, self.image_of_row[row])

    def set_hard_negatives(self, row: int, images: Sequence[int], rows: Sequence[int]) -> None:
        """From now on, take these wrong images and captions (hardest first) for the row."""
        for table, values in ((self.hard_images, images), (self.hard_rows, rows)):
            values = list(values)[: table.shape[1]]
            table[row] = torch.tensor(values + [-1] * (table.shape[1] - len(values)))

    def keep_mining(self, number: int) -> None:
        """Keep what is set now as the result of a mining, in place of the oldest one."""
        self.mined_images[number % KEPT_MININGS] = self.hard_images
        self.mined_rows[number % KEPT_MININGS] = self.hard_rows

    def _check_candidates(self) -> None:
        """Each language needs wrong captions, and wrong images, or a draw would fail late."""
        for language, rows in zip(self.languages, self.rows_of_language, strict=True):
            for row in rows[[0, -1]]:
                if self.num_negative_captions and not any(
                    self.is_wrong_caption(row, other) for other in rows
                ):
                    found = Found(f"no caption in {language!r} of another image than {self._id(row)!r}")
                    raise DataError(field="caption", found=found, expected="one to draw as a negative")
                if self.num_negative_images and not any(
                    self.is_wrong_image(row, image) for image in range(len(self.image_ids))
                ):
                    found = Found(f"no other image than {self._id(row)!r}")
                    raise DataError(field="image_id", found=found, expected="one to draw as a negative")

    def _id(self, row: int) -> str:
        return self.image_ids[self.image_of_row[row]]

    def _encode_text(self, row: int) -> dict[str, np.ndarray]:
        caption = self.captions[int(row)]["caption"]
        ids = self.processor.tokenizer(caption, truncation=True, max_length=self.max_length)["input_ids"]
        return {"input_ids": np.array(ids, np.int64)}

    def _encode_image(self, image: int) -> dict[str, np.ndarray]:
        return {"example_id": int(image), **self.processor.encode_regions(self.store[self.image_ids[image]])}


def _draw(
    rng, items: np.ndarray, accept: Callable[[int], bool], mined: torch.Tensor, count: int
) -> np.ndarray:
    """`count` accepted items: the mined ones, then others at random, repeated only if there are too few."""
    chosen = mined[mined >= 0].tolist()
    for _ in range(MAX_TRIES * count):
        if len(chosen) == count:
            break
        item = int(items[rng.integers(len(items))])
        if item not in chosen and accept(item):
            chosen.append(item)
    if len(chosen) < count:  # few items are accepted: look at all of them
        others = [item for item in items.tolist() if item not in chosen and accept(item)] or chosen
        missing = count - len(chosen)
        chosen += rng.choice(others, missing, replace=len(others) < missing).tolist()
    return np.array(chosen, np.int64)


def _as_read(caption: str) -> str:
    """Captions that differ in case, spaces or their final stop alone read alike."""
    return " ".join(caption.casefold().split()).rstrip(" .!。")


def _numbered(values: Iterable[str]) -> tuple[list[str], np.ndarray]:
    """The distinct values in order of appearance, and each value's index among them."""
    numbers: dict[str, int] = {}
    index = np.array([numbers.setdefault(value, len(numbers)) for value in values], np.int64)
    return list(numbers), index


def _images_of_shared_texts(text_of_row: np.ndarray, image_of_row: np.ndarray) -> dict[int, set[int]]:
    """Text -> its images, for the texts that several images have."""
    pairs = np.unique(np.stack([text_of_row, image_of_row], axis=1), axis=0)
    texts, counts = np.unique(pairs[:, 0], return_counts=True)
    shared: dict[int, set[int]] = {int(text): set() for text in texts[counts > 1]}
    for text, image in pairs[np.isin(pairs[:, 0], texts[counts > 1])].tolist():
        shared[text].add(image)
    return shared


@dataclass
class RetrievalCollator:
    """Flattens groups into one batch of pairs, padded by `collator`, with what the loss needs.

    Args:
        collator: pads a list of encoded pairs.
        group_size: pairs per group.
        loss: "triplet" adds `group_size`, "bce" adds `labels (B,)`, 1 for the first pair of each group.
    """

    collator: object
    group_size: int
    loss: str = "triplet"

    def __post_init__(self):
        if self.loss not in ("triplet", "bce"):
            raise ValueError(f"loss must be triplet or bce, found {self.loss!r}")

    def __call__(self, groups: list[list[dict]]) -> dict:
        batch = dict(self.collator([pair for group in groups for pair in group]))
        if self.loss == "triplet":
            return batch | {"group_size": self.group_size}
        labels = torch.zeros(len(groups), self.group_size)
        labels[:, 0] = 1.0
        return batch | {"labels": labels.flatten()}


@dataclass(frozen=True)
class RetrievalTestSet:
    """All captions of one language of one data set, to be scored against all of their images."""

    name: str
    language: str
    texts: list[str]
    image_ids: list[str]
    text_to_image: np.ndarray = field(repr=False)  # (num_texts,) index into image_ids
    folds: int = 1


def load_captions_of(files, store: Mapping, languages: Sequence[str] | None) -> datasets.Dataset:
    """Caption rows of the languages (None: of all), whose images are all in the store and sound.

    Raises:
        DataError: naming the row, if an image is missing or its regions are broken, or a language has no row.
    """
    captions = load_captions(files)
    check_images_in_store(captions, files, store)
    present = sorted(captions.unique("language"))
    for language in languages or ():
        if language not in present:
            found = Found(", ".join(present) or "no row")
            raise DataError(
                file=_joined(files), field="language", found=found, expected=f"rows in {language!r}"
            )
    if languages:
        captions = _rows_in(captions, languages)
    check_regions(captions.unique("image_id"), store)
    return captions


def _rows_in(captions: datasets.Dataset, languages: Sequence[str]) -> datasets.Dataset:
    return captions.select(np.flatnonzero(np.isin(np.array(captions["language"]), list(languages))))


def check_regions(image_ids: Sequence[str], store: Mapping) -> None:
    """Check every value of the images' regions before anything is computed: DataError names the image."""
    for image_id in image_ids:
        check_region_row(store[image_id], file=_joined(getattr(store, "paths", "region store")))


def _joined(files) -> str:
    return str(files) if not isinstance(files, list | tuple) else ", ".join(map(str, files))


def load_test_sets(
    files: Mapping[str, str],
    store: Mapping,
    languages: Sequence[str] | None = None,
    folds: Mapping[str, int] | None = None,
) -> list[RetrievalTestSet]:
    """One test set per data set and language.

    Args:
        files: data set name -> caption file.
        store: mapping from image id to region row.
        languages: those to evaluate, in this order; a data set need not have all of them. None: all.
        folds: data set name -> number of equal folds of images (COCO 1K: 5); 1 where it is not named.
    """
    folds = dict(folds or {})
    if unknown := sorted(set(folds) - set(files)):
        raise DataError(field="eval_folds", found=unknown[0], expected=f"one of {', '.join(files)}")
    test_sets = []
    for name, file in files.items():
        captions = load_captions_of(file, store, None)
        for language in languages or captions.unique("language"):
            rows = _rows_in(captions, [language])
            if len(rows):
                test_sets.append(_test_set(name, language, rows, folds.get(name, 1), file))
    for language in languages or ():
        if language not in {test_set.language for test_set in test_sets}:
            found = Found(f"no row in {language!r}")
            raise DataError(file=_joined(list(files.values())), field="language", found=found,
                            expected="a row of every language asked for")  # fmt: skip
    return test_sets


def _test_set(name: str, language: str, rows: datasets.Dataset, folds: int, file) -> RetrievalTestSet:
    index = {image_id: number for number, image_id in enumerate(dict.fromkeys(rows["image_id"]))}
    if folds < 1 or len(index) % folds:
        found = Found(f"{len(index)} images in {language!r}")
        raise DataError(file=file, field="image_id", found=found, expected=f"{folds} folds of equal size")
    text_to_image = np.array([index[image_id] for image_id in rows["image_id"]])
    return RetrievalTestSet(name, language, list(rows["caption"]), list(index), text_to_image, folds)
