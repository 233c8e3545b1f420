"""VQA data: question rows, checked before training, and encoded questions with soft targets (paper 4.1.2)."""

from collections.abc import Mapping, Sequence

import datasets
import numpy as np

from uc2.data_error import DataError, Found
from uc2.retrieval_data import check_regions
from uc2.rows import check_images_in_store, load_questions
from uc2.vqa import answer_scores


class VQADataset:
    """Questions about images: `dataset[key]` is encoded, `key = epoch * len(dataset) + row`.

    Nothing is random, so every epoch has the same examples; keys are what `EpochBatchSampler` yields.

    Args:
        questions: rows with `question_id`, `image_id`, `language`, `question`, `answers`, `answer_type`.
        store: mapping from image id to region row, with `class_scores(image_id)`.
        processor: a UC2Processor.
        label2id: answer -> class. Without it, examples have no `answer_targets`.
        max_length: longest question in tokens, with `<s>` and `</s>`; longer ones are cut.
    """

    def __init__(
        self,
        questions: datasets.Dataset,
        store,
        processor,
        label2id: Mapping[str, int] | None = None,
        *,
        max_length: int = 60,
    ):
        self.questions, self.store, self.processor, self.label2id = questions, store, processor, label2id
        self.image_ids = list(questions["image_id"])
        self._ids, self._id_starts = self._tokenize(list(questions["question"]), max_length)
        self._targets = self._target_table() if label2id is not None else None

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, key: int) -> dict[str, np.ndarray]:
        """`input_ids (l,)`, `region_features (n, F)`, `region_boxes (n, 4)`, `example_id` = key and, with
        `label2id`, `answer_targets (classes,)` float32."""
        row = int(key) % len(self)
        ids = self._ids[self._id_starts[row] : self._id_starts[row + 1]].astype(np.int64)
        example = {"input_ids": ids, "example_id": int(key)}
        example |= self.processor.encode_regions(self.store[self.image_ids[row]])
        if self._targets is not None:
            example["answer_targets"] = self._target_row(row)
        return example

    def lengths(self, keys: Sequence[int]) -> np.ndarray:
        """`(m, 2)`: text tokens and regions of the examples, without reading features."""
        rows = np.asarray(keys) % len(self)
        tokens = np.diff(self._id_starts)[rows]
        counts: dict[str, int] = {}
        for image_id in dict.fromkeys(self.image_ids[row] for row in rows):
            counts[image_id] = len(self.processor.select_regions(self.store.class_scores(image_id)))
        return np.stack([tokens, [counts[self.image_ids[row]] for row in rows]], axis=1)

    def image_id(self, key: int) -> str:
        return self.image_ids[key % len(self)]

    def answer_coverage(self) -> float:
        """Share of the questions that have an answer among the classes; the others train every class to 0."""
        return float((np.diff(self._targets[0]) > 0).mean())

    def _tokenize(self, texts: list[str], max_length: int) -> tuple[np.ndarray, np.ndarray]:
        """All questions' ids behind one another, and where each starts: small, and cheap to share."""
        encoded = self.processor.tokenizer(texts, truncation=True, max_length=max_length)["input_ids"]
        starts = np.concatenate([[0], np.cumsum([len(ids) for ids in encoded])])
        return np.concatenate([np.asarray(ids, np.int32) for ids in encoded]), starts

    def _target_table(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(starts, classes, scores) of the answers that are classes; dense, it would be rows x classes."""
        starts, classes, scores = [0], [], []
        for given in self.questions["answers"]:
            known = {
                self.label2id[answer]: score
                for answer, score in answer_scores(given).items()
                if answer in self.label2id
            }
            classes.extend(known)
            scores.extend(known.values())
            starts.append(len(classes))
        return np.array(starts), np.array(classes, np.int64), np.array(scores, np.float32)

    def _target_row(self, row: int) -> np.ndarray:
        starts, classes, scores = self._targets
        targets = np.zeros(len(self.label2id), dtype=np.float32)
        part = slice(starts[row], starts[row + 1])
        targets[classes[part]] = scores[part]
        return targets


def load_questions_of(
    files: str | Sequence[str], store: Mapping, languages: Sequence[str] = (), *, answers: str = "required"
) -> datasets.Dataset:
    """Question rows of the languages (none named: of all), whose images are all in the store and sound.

    Args:
        answers: "required" in training; "all or none" in evaluation, where a test split has none.
    Raises:
        DataError: naming the first row that lacks answers or an image, the image whose regions are broken, or
            the language that has no row.
    """
    files = [files] if isinstance(files, str) else list(files)
    questions = load_questions(files)
    check_images_in_store(questions, files, store)
    present = questions.unique("language")
    for language in languages:
        if language not in present:
            raise DataError(
                file=", ".join(files),
                field="language",
                found=Found(f"only {', '.join(present)}"),
                expected=f"rows in {language!r}",
            )
    lacking = [given is None for given in questions["answers"]]
    if any(lacking) and (answers == "required" or not all(lacking)):
        file, row = _first_without_answers(files)
        expected = "answers to train on" if answers == "required" else "answers, as other rows have them"
        raise DataError(file=file, row=row, field="answers", found=None, expected=expected)
    if languages:
        kept = np.isin(np.array(questions["language"]), list(languages))
        questions = questions.select(np.flatnonzero(kept))
    check_regions(questions.unique("image_id"), store)
    return questions


def _first_without_answers(files: Sequence[str]) -> tuple[str, int]:
    return next(
        (file, row)
        for file in files
        for row, given in enumerate(load_questions(file)["answers"], start=1)
        if given is None
    )
