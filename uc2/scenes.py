"""The embedded demo corpus: rendered scenes with captions, questions and regions, from a seed.

    python -m uc2.scenes --output_dir demo/corpus --num_train 2000 --num_val 200 --num_test 200

writes, whole or not at all:

    images/<image_id>.png             the pictures
    {train,val,test}.jsonl            parallel captions in six languages with word alignments (uc2.rows)
    captions_{split}.jsonl            the same captions a row each, for retrieval
    questions_{split}.jsonl           English and Japanese questions with answers
    regions/{split}/                  region stores (uc2.region_store)
    object_labels.json                the names of the detector's classes in six languages
    tokenizer/                        a small XLM-R-style tokenizer trained on the training texts
    text_encoder/                     a small stand-in for XLM-R with multilingual word embeddings
    corpus.json                       settings, counts, seconds, accuracy of the probe on the other splits
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from uc2.arguments import parse
from uc2.atomic_files import atomic_directory
from uc2.demo_text_encoder import save_demo_text_encoder
from uc2.demo_tokenizer import train_tokenizer
from uc2.region_store import RegionRow, write_region_store
from uc2.rows import load_parallel_captions, write_jsonl
from uc2.scene_captions import GRAMMARS, describe, unspaced_words
from uc2.scene_images import render
from uc2.scene_layout import COLOURS, LABELS, Scene, draw_scene
from uc2.scene_lexicon import label_words
from uc2.scene_questions import draw_questions, question_rows
from uc2.scene_regions import PrincipalComponents, Proposals, RegionEncoder, SoftmaxProbe, propose_boxes
from uc2.word_alignment import align_captions

logger = logging.getLogger(__name__)

SPLITS = ("train", "val", "test")
LANGUAGES = tuple(GRAMMARS)
FORMAT = 2  # raised when the same settings come to mean another corpus
_BATCH = 32  # images per pass through the backbone
_COMPONENT_BATCHES = 16  # of the training split: enough regions for the principal components
_NAME_COPIES = 50  # of the class names in the tokenizer's text, so that even a rare one is a whole piece
_MAX_DRAWS = 2000  # scenes drawn in search of one that is not yet described
_LAYOUT, _PICTURE, _BOXES, _WORDING, _QUESTIONS = range(5)  # independent random streams of a scene


@dataclass(frozen=True)
class CorpusSettings:
    """What determines a demo corpus."""

    output_dir: str = field(metadata={"help": "Folder to create"})
    num_train: int = field(default=2000, metadata={"help": "Scenes to train on"})
    num_val: int = field(default=200, metadata={"help": "Scenes for validation"})
    num_test: int = field(default=200, metadata={"help": "Scenes for testing"})
    seed: int = field(default=0, metadata={"help": "Determines everything that is drawn at random"})
    image_size: int = field(default=192, metadata={"help": "Side of the pictures in pixels"})
    backbone: str = field(default="resnet18", metadata={"help": "timm model that region features come from"})
    pretrained: bool | None = field(
        default=None, metadata={"help": "Pretrained backbone weights; by default, if they can be had"}
    )
    feature_size: int = field(default=256, metadata={"help": "Width of a region feature"})
    vocab_size: int = field(default=1200, metadata={"help": "Pieces of the tokenizer, at most"})
    questions_per_scene: int = field(default=4, metadata={"help": "Questions in each of en and ja"})

    def __post_init__(self):
        for name in ("num_train", "num_val", "num_test", "image_size", "feature_size", "questions_per_scene"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1")
        if self.image_size < 64:
            raise ValueError(f"image_size is {self.image_size}; expected at least 64 pixels")

    def content(self) -> dict:
        """Everything but the place, as recorded in corpus.json."""
        return {key: value for key, value in asdict(self).items() if key != "output_dir"} | {"format": FORMAT}


def build_demo_corpus(output_dir: str | os.PathLike, **settings) -> Path:
    """Build the corpus in `output_dir`, or reuse the one that the same settings built there.

    Args:
        output_dir: the folder to create.
        **settings: the fields of `CorpusSettings`.

    Raises:
        FileExistsError: the folder holds something else.
        ValueError: a setting is impossible, or there are too few different scenes for the counts asked for.
    """
    asked = CorpusSettings(os.fspath(output_dir), **settings)
    path = Path(output_dir)
    if (path / "corpus.json").is_file():
        built = json.loads((path / "corpus.json").read_text(encoding="utf-8"))["settings"]
        if built == asked.content():
            logger.info("Reusing the demo corpus in %s", path)
            return path
    with atomic_directory(path) as directory:
        _CorpusBuilder(asked, directory).build()
    return path


class _CorpusBuilder:
    """Writes one corpus into an empty directory."""

    def __init__(self, settings: CorpusSettings, directory: Path):
        self.settings, self.directory = settings, directory
        self.counts = {"train": settings.num_train, "val": settings.num_val, "test": settings.num_test}

    def build(self) -> None:
        began = time.perf_counter()
        scenes = draw_splits(self.counts, self.settings.seed)
        texts = [text for split in SPLITS for text in self._write_texts(split, scenes[split])]
        labels = {language: [label_words(label)[language] for label in LABELS] for language in LANGUAGES}
        write_json(labels, self.directory / "object_labels.json")
        names = [name for language in LANGUAGES for name in labels[language]]
        tokenizer = train_tokenizer(texts + _NAME_COPIES * names, self.settings.vocab_size, unspaced_words())
        tokenizer.save_pretrained(self.directory / "tokenizer")
        self._align(tokenizer)
        lines = (self.directory / "train.jsonl").read_text(encoding="utf-8").splitlines()
        captions = [json.loads(line)["captions"] for line in lines]
        save_demo_text_encoder(self.directory / "text_encoder", tokenizer, captions, seed=self.settings.seed)
        report = self._write_regions(scenes)
        report["vocab_size"] = len(tokenizer)
        report["seconds"] = round(time.perf_counter() - began, 1)
        write_json({"settings": self.settings.content(), **report}, self.directory / "corpus.json")

    def _rng(self, split: str, number: int, stream: int) -> np.random.Generator:
        return np.random.default_rng((self.settings.seed, SPLITS.index(split), number, stream))

    def _write_texts(self, split: str, scenes: list[Scene]) -> list[str]:
        """Writes a split's captions and questions; returns the texts if they are to train on."""
        parallel, questions = [], []
        for number, scene in enumerate(scenes):
            name = image_id(split, number)
            wordings = self._rng(split, number, _WORDING).integers(6, size=len(LANGUAGES))
            captions = {
                language: describe(scene.description, language, int(wording))
                for language, wording in zip(LANGUAGES, wordings, strict=True)
            }
            parallel.append({"image_id": name, "captions": captions})
            rng = self._rng(split, number, _QUESTIONS)
            drawn = draw_questions(scene, rng, self.settings.questions_per_scene)
            questions.extend(question_rows(name, drawn, rng))
        single = [
            {"image_id": row["image_id"], "language": language, "caption": caption}
            for row in parallel
            for language, caption in row["captions"].items()
        ]
        write_jsonl(parallel, self.directory / f"{split}.jsonl")
        write_jsonl(single, self.directory / f"captions_{split}.jsonl")
        write_jsonl(questions, self.directory / f"questions_{split}.jsonl")
        if split != "train":
            return []
        return [row["caption"] for row in single] + [row["question"] for row in questions]

    def _align(self, tokenizer) -> None:
        """Adds word alignments, learnt over all splits together, to the parallel captions."""
        files = [str(self.directory / f"{split}.jsonl") for split in SPLITS]
        with tempfile.TemporaryDirectory() as cache_dir:
            rows = iter(align_captions(load_parallel_captions(files), tokenizer, cache_dir=cache_dir))
            for file, count in zip(files, self.counts.values(), strict=True):
                part = list(itertools.islice(rows, count))
                for row in part:
                    row["alignment"] = {code: links for code, links in row["alignment"].items() if links}
                write_jsonl(part, file)

    def _write_regions(self, scenes: dict[str, list[Scene]]) -> dict:
        """Paints the pictures and writes the region stores; returns what corpus.json tells about them."""
        (self.directory / "images").mkdir()
        encoder = RegionEncoder(
            self.settings.backbone, pretrained=self.settings.pretrained, seed=self.settings.seed
        )
        raw = self._raw_batches("train", scenes["train"], encoder)
        first = list(itertools.islice(raw, _COMPONENT_BATCHES))
        components = PrincipalComponents.fit(
            torch.cat([batch.features for batch in first]), self.settings.feature_size, self.settings.seed
        )
        splits = {"train": _project(itertools.chain(first, raw), components)}
        for split in SPLITS[1:]:
            splits[split] = _project(self._raw_batches(split, scenes[split], encoder), components)
        kinds, colours = _fit_probes(splits["train"])
        for split, regions in splits.items():
            rows = self._region_rows(split, regions, kinds)
            write_region_store(rows, self.directory / "regions" / split)
        held_out = _SplitRegions.join([splits["val"], splits["test"]])
        coloured = held_out.colours >= 0
        return {
            "scenes": self.counts,
            "regions": {split: len(regions.labels) for split, regions in splits.items()},
            "feature_size": splits["train"].features.shape[1],
            "backbone_weights": "pretrained" if encoder.pretrained else f"random, seed {self.settings.seed}",
            "probe_accuracy": {
                "kind": round(kinds.accuracy(held_out.features, held_out.labels), 4),
                "colour": round(colours.accuracy(held_out.features[coloured], held_out.colours[coloured]), 4),
            },
        }

    def _raw_batches(
        self, split: str, scenes: list[Scene], encoder: RegionEncoder
    ) -> Iterator[_SplitRegions]:
        size = self.settings.image_size
        batches = range(0, len(scenes), _BATCH)
        for start in tqdm(batches, desc=f"{split} scenes", unit_scale=_BATCH, leave=False):
            images, proposals = [], []
            for number in range(start, min(start + _BATCH, len(scenes))):
                picture = render(scenes[number], size, self._rng(split, number, _PICTURE))
                picture.save(self.directory / "images" / f"{image_id(split, number)}.png")
                images.append(np.asarray(picture))
                proposals.append(propose_boxes(scenes[number], self._rng(split, number, _BOXES)))
            features = encoder(np.stack(images), [proposal.boxes for proposal in proposals])
            yield _SplitRegions.of(features, proposals)

    def _region_rows(self, split: str, regions: _SplitRegions, probe: SoftmaxProbe) -> Iterator[RegionRow]:
        size = self.settings.image_size
        probabilities = probe(regions.features).numpy()
        features, start = regions.features.numpy(), 0
        for number, boxes in enumerate(regions.boxes):
            probs = probabilities[start : start + len(boxes)]
            # Stored in falling order of score, as detectors write them.
            order = np.argsort(-probs.max(axis=1), kind="stable")
            yield RegionRow(
                image_id=image_id(split, number),
                image_height=size,
                image_width=size,
                boxes=(boxes[order] * size).astype(np.float32),
                features=features[start : start + len(boxes)][order].astype(np.float16),
                class_ids=probs[order].argmax(axis=1).astype(np.int64),
                class_scores=probs[order].max(axis=1).astype(np.float32),
                class_probs=probs[order].astype(np.float16),
            )
            start += len(boxes)


@dataclass(frozen=True)
class _SplitRegions:
    """Regions of consecutive images: `boxes` per image, the rest over all regions in that order."""

    boxes: list[np.ndarray]
    features: torch.Tensor
    labels: torch.Tensor
    colours: torch.Tensor

    @classmethod
    def of(cls, features: torch.Tensor, proposals: list[Proposals]) -> _SplitRegions:
        labels = torch.from_numpy(np.concatenate([proposal.labels for proposal in proposals]))
        colours = torch.from_numpy(np.concatenate([proposal.colours for proposal in proposals]))
        return cls([proposal.boxes for proposal in proposals], features, labels, colours)

    @classmethod
    def join(cls, parts: Iterable[_SplitRegions]) -> _SplitRegions:
        parts = list(parts)
        tensors = (
            torch.cat([getattr(part, name) for part in parts]) for name in ("features", "labels", "colours")
        )
        return cls([boxes for part in parts for boxes in part.boxes], *tensors)


def _project(batches: Iterable[_SplitRegions], components: PrincipalComponents) -> _SplitRegions:
    return _SplitRegions.join(
        _SplitRegions(batch.boxes, components(batch.features), batch.labels, batch.colours)
        for batch in batches
    )


def _fit_probes(regions: _SplitRegions) -> tuple[SoftmaxProbe, SoftmaxProbe]:
    """The detector's classifier, and one for colours that only measures what the features carry."""
    kinds = SoftmaxProbe.fit(regions.features, regions.labels, len(LABELS))
    coloured = regions.colours >= 0
    return kinds, SoftmaxProbe.fit(regions.features[coloured], regions.colours[coloured], len(COLOURS))


def image_id(split: str, number: int) -> str:
    return f"{split}-{number:06d}"


def draw_splits(counts: dict[str, int], seed: int) -> dict[str, list[Scene]]:
    """Scenes per split, no two described by the same things.

    In a split other than "train" no caption's things are all in another picture either, so that retrieval has
    one right answer. Raises ValueError when there are not enough different scenes.
    """
    described: set[frozenset] = set()
    splits: dict[str, list[Scene]] = {}
    for split, count in counts.items():
        scenes = splits[split] = []
        rng = np.random.default_rng((seed, SPLITS.index(split), 0, _LAYOUT))
        while len(scenes) < count:
            scene = _draw_new_scene(rng, described, [] if split == "train" else scenes)
            described.add(scene.described)
            scenes.append(scene)
    return splits


def _draw_new_scene(rng: np.random.Generator, described: set[frozenset], others: list[Scene]) -> Scene:
    for _ in range(_MAX_DRAWS):
        scene = draw_scene(rng)
        if scene.described not in described and not any(
            scene.described <= other.contents or other.described <= scene.contents for other in others
        ):
            return scene
    raise ValueError(f"no new scene in {_MAX_DRAWS} draws: ask for fewer than {len(described) + 1} scenes")


def write_json(value, path: Path) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    """Builds the corpus that the flags (or a YAML/JSON file) describe."""
    (settings,) = parse([CorpusSettings], sys.argv[1:] if argv is None else argv)
    path = build_demo_corpus(**asdict(settings))
    report = json.loads((path / "corpus.json").read_text(encoding="utf-8"))
    accuracy = report["probe_accuracy"]
    print(f"{path}: {report['scenes']} scenes, {report['seconds']} s, backbone: {report['backbone_weights']}")
    print(f"probe on held-out regions: kind {accuracy['kind']:.1%}, colour {accuracy['colour']:.1%}")


if __name__ == "__main__":
    main()
