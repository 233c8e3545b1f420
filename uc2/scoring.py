"""Fast scoring of all text-image pairs: the matrix that retrieval is evaluated on.

Compared with the plain forward of every pair, each text and each image is embedded once, pairs of equal total
length share a micro-batch (so that almost nothing is padding), the first layer's query, key and value are
computed once per text and image of a block, and the last layer is computed for the first token only, the one
that the pooler reads. On a CPU, weights are packed for oneDNN, whose kernel also applies the GELU.
"""

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm.auto import tqdm

from uc2.atomic_files import atomic_file, write_json
from uc2.data_error import OptionError
from uc2.scoring_layers import PRECISIONS, scoring_layers

logger = logging.getLogger(__name__)

TEXTS_PER_BLOCK, IMAGES_PER_BLOCK = 128, 64  # a block is what is saved, resumed and sharded as a whole


def score_matrix(
    model,
    texts: Sequence[str],
    regions: Sequence,
    processor,
    *,
    batch_tokens: int = 2500,
    precision: str = "fp32",
    max_length: int | None = None,
    resume_dir: str | os.PathLike | None = None,
    progress: bool = False,
) -> np.ndarray:
    """Score every text against every image: (num_texts, num_images) float32, higher fits better.

    Works for a model with a `score_head` (UC2ForRetrieval: its logit) and for one with an `itm_head`
    (UC2ForPreTraining, zero-shot: the match logit minus the no-match logit); the sigmoid is the probability
    in both. With torch.distributed initialised the blocks are shared round-robin, and every process returns
    the whole matrix.

    Args:
        model: the model, on the device to compute on; its mode and weights are left as they are.
        texts: captions in any language.
        regions: one region row per image, as `RegionStore` gives them.
        processor: the model's UC2Processor.
        batch_tokens: tokens and regions per micro-batch; about 2,500 is fastest on a CPU, more on a GPU.
        precision: "fp32" (equal to the plain forward), "bf16" (GPUs, and CPUs with AMX) or "int8" (products
            of 8-bit numbers, CPU only); see `uc2.scoring_layers`.
        max_length: longest text in tokens; longer ones are cut. None: what the model can take.
        resume_dir: a folder for finished blocks. A killed evaluation, called again with the same folder,
            continues.
        progress: show pairs/s and the time left.
    Raises:
        ValueError: on unknown options, empty input, a score that is NaN, or a `resume_dir` of another
            evaluation.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, found {precision!r}")
    if not texts or not regions:
        raise ValueError(f"there is nothing to score: {len(texts)} texts and {len(regions)} images")
    if batch_tokens < 1:
        raise ValueError(f"batch_tokens must be at least 1, found {batch_tokens}")

    token_ids = _encode_texts(model, texts, processor, max_length)
    blocks = _make_blocks([len(ids) for ids in token_ids], _count_regions(regions, processor))
    saved = None
    if resume_dir is not None:
        fingerprint = _fingerprint(model, token_ids, regions, processor, precision)
        saved = _SavedBlocks(Path(resume_dir), fingerprint)

    rank, world_size = _rank_and_world_size()
    mine = blocks[rank::world_size]
    scores = np.zeros((len(texts), len(regions)), np.float32)
    total = sum(block.num_pairs for block in mine)
    with (
        _evaluation_mode(model),
        tqdm(total=total, unit="pairs", unit_scale=True, disable=not (progress and rank == 0)) as bar,
    ):
        scorer = _PairScorer(model, token_ids, regions, processor, batch_tokens, precision)
        for block in mine:
            block_scores = saved.load(block) if saved else None
            if block_scores is None:
                block_scores = scorer.score(block)
                if np.isnan(block_scores).any():
                    text, image = np.argwhere(np.isnan(block_scores))[0]
                    raise ValueError(
                        f"the score of text {block.texts[text]} and image {block.images[image]} is NaN; "
                        "check the region features and the weights"
                    )
                if saved:
                    saved.save(block, block_scores)
            scores[np.ix_(block.texts, block.images)] = block_scores
            bar.update(block.num_pairs)
    return _sum_over_processes(scores, model.device) if world_size > 1 else scores


@contextmanager
def _evaluation_mode(model) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def save_scores(path: str | os.PathLike, scores: np.ndarray) -> None:
    """Write a matrix to a .npy file, whole or not at all."""
    with atomic_file(path) as temporary, open(temporary, "wb") as file:
        np.save(file, scores, allow_pickle=False)


@dataclass(frozen=True)
class _Block:
    """A rectangle of the matrix. Texts and images are sorted by length first, so its pairs are of similar
    length."""

    index: int
    texts: np.ndarray
    images: np.ndarray

    @property
    def num_pairs(self) -> int:
        return len(self.texts) * len(self.images)


def _make_blocks(text_lengths: Sequence[int], num_regions: Sequence[int]) -> list[_Block]:
    """Image-major, so that an image's embedding is needed only while its row of blocks lasts."""
    by_length = np.argsort(text_lengths, kind="stable")
    by_count = np.argsort(num_regions, kind="stable")
    text_groups = np.split(by_length, range(TEXTS_PER_BLOCK, len(by_length), TEXTS_PER_BLOCK))
    image_groups = np.split(by_count, range(IMAGES_PER_BLOCK, len(by_count), IMAGES_PER_BLOCK))
    pairs = [(texts, images) for images in image_groups for texts in text_groups]
    return [_Block(index, texts, images) for index, (texts, images) in enumerate(pairs)]


def _encode_texts(model, texts: Sequence[str], processor, max_length: int | None) -> list[list[int]]:
    limit = model.config.max_position_embeddings - model.config.pad_token_id - 1
    max_length = min(max_length or limit, limit)
    return [
        list(processor.tokenizer(text, truncation=True, max_length=max_length)["input_ids"]) for text in texts
    ]


def _count_regions(regions: Sequence, processor) -> list[int]:
    counts = []
    for image, region in enumerate(regions):
        try:
            counts.append(len(processor.encode_regions(region)["region_boxes"]))
        except ValueError as error:
            name = getattr(region, "image_id", None)
            raise ValueError(f"image {image if name is None else repr(name)}: {error}") from error
    return counts


class _PairScorer:
    """Scores blocks of pairs. Holds the embeddings of all texts and of the current block's images."""

    def __init__(self, model, token_ids, regions, processor, batch_tokens: int, precision: str):
        self.model, self.backbone, self.device = model, model.uc2, model.device
        self.token_ids, self.regions, self.processor = token_ids, regions, processor
        self.batch_tokens = batch_tokens
        self.layers = scoring_layers(model, precision, batch_tokens)
        self.texts: dict[int, Tensor] = {}  # text -> (tokens, H), embedded once
        self.images: dict[int, Tensor] = {}  # image -> (regions, H), embedded once, dropped after its blocks

    @torch.inference_mode()
    def score(self, block: _Block) -> np.ndarray:
        """(len(block.texts), len(block.images)) float32."""
        self._embed(block)
        parts = [self.texts[i] for i in block.texts] + [self.images[i] for i in block.images]
        rows = torch.cat(parts)  # (all tokens and regions of the block, H)
        first = self.layers[0].project(rows)
        scores = torch.empty(block.num_pairs, dtype=torch.float32, device=self.device)
        for pairs, index, lengths in self._micro_batches([len(part) for part in parts], len(block.texts)):
            scores[pairs.to(self.device)] = self._forward(rows, first, index.to(self.device), lengths)
        return scores.view(len(block.texts), len(block.images)).cpu().numpy()

    def _embed(self, block: _Block) -> None:
        for i in block.texts:
            if i not in self.texts:
                ids = torch.tensor(self.token_ids[i], device=self.device)[None]
                self.texts[i] = self.backbone.embed_text(ids)[0]
        self.images = {i: self.images[i] for i in block.images if i in self.images}
        for i in block.images:
            if i not in self.images:
                encoded = self.processor.encode_regions(self.regions[i])
                parts = (encoded["region_features"], encoded["region_boxes"])
                features, boxes = (torch.from_numpy(np.array(part))[None].to(self.device) for part in parts)
                self.images[i] = self.backbone.embed_regions(features, boxes)[0]

    def _micro_batches(
        self, lengths: list[int], num_texts: int
    ) -> Iterator[tuple[Tensor, Tensor, np.ndarray]]:
        """Yield (pair numbers (B,), index (B, L) into the block's rows, lengths (B,)), longest pairs first.

        A pair's row of `index` is its text's rows, then its image's, then padding (any row). Only the sum of
        the two lengths matters, so pairs of different texts and images fill a batch without padding.
        """
        lengths = np.asarray(lengths)
        starts = np.cumsum(lengths) - lengths
        text = np.repeat(np.arange(num_texts), len(lengths) - num_texts)  # (pairs,)
        image = np.tile(np.arange(num_texts, len(lengths)), num_texts)
        total = lengths[text] + lengths[image]
        order = np.argsort(-total, kind="stable")
        begin = 0
        while begin < len(order):
            longest = total[order[begin]]
            pairs = order[begin : begin + max(1, self.batch_tokens // longest)]
            begin += len(pairs)
            t, i = text[pairs, None], image[pairs, None]  # (B, 1)
            position = np.arange(longest)[None]
            index = np.where(position < lengths[t], starts[t] + position, starts[i] + position - lengths[t])
            index = np.where(position < total[pairs, None], index, 0)
            yield torch.from_numpy(pairs), torch.from_numpy(index), total[pairs]

    def _forward(self, rows: Tensor, first: tuple, index: Tensor, lengths: np.ndarray) -> Tensor:
        """Encoder and head: scores (B,) float32."""
        mask = None  # without padding, attention needs no mask
        if lengths.min() < index.shape[1]:
            real = torch.arange(index.shape[1]) < torch.from_numpy(lengths)[:, None]  # (B, L)
            mask = real[:, None, None].to(self.device)
        hidden = rows[index]  # (B, L, H)
        projected = tuple(part[index] for part in first)
        for layer in self.layers:
            first_only = layer is self.layers[-1]  # the pooler reads the first token
            hidden = layer.forward(hidden, mask, projected=projected, first_only=first_only)
            projected = None
        return self._head(hidden)

    def _head(self, hidden: Tensor) -> Tensor:
        pooled = self.backbone.pooler(hidden)
        if hasattr(self.model, "score_head"):
            return self.model.score_head(pooled)[:, 0].float()
        no_match, match = self.model.itm_head(pooled).float().unbind(1)
        return match - no_match


def _rank_and_world_size() -> tuple[int, int]:
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def _sum_over_processes(scores: np.ndarray, device: torch.device) -> np.ndarray:
    """Every pair is non-zero on one process only, so the sum is exact."""
    total = torch.from_numpy(scores).to(device)
    dist.all_reduce(total)
    return total.cpu().numpy()


class _SavedBlocks:
    """Finished blocks of one evaluation in a folder: `fingerprint.json` and a .npy file per block."""

    def __init__(self, folder: Path, fingerprint: dict[str, str]):
        self.folder = folder
        file = folder / "fingerprint.json"
        if file.exists():
            found = json.loads(file.read_text("utf-8"))
            changed = [name for name in fingerprint if found.get(name) != fingerprint[name]]
            if changed:
                raise OptionError(
                    f"{folder} holds the scores of another evaluation (its {', '.join(changed)} differ); "
                    "give another folder or delete this one"
                )
        else:
            write_json(fingerprint, file)

        # In the names, too: a folder that was half removed may have lost the file but kept blocks.
        self.digest = hashlib.blake2b(json.dumps(fingerprint).encode(), digest_size=6).hexdigest()

    def load(self, block: _Block) -> np.ndarray | None:
        """The block's scores, if they were saved and are readable."""
        try:
            scores = np.load(self._path(block), allow_pickle=False)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, EOFError) as error:
            logger.warning(f"{self._path(block)} cannot be read ({error}); its scores are computed again.")
            return None
        return scores

    def save(self, block: _Block, scores: np.ndarray) -> None:
        save_scores(self._path(block), scores)

    def _path(self, block: _Block) -> Path:
        return self.folder / f"block_{block.index:06d}_{self.digest}.npy"


def _fingerprint(model, token_ids, regions, processor, precision: str) -> dict[str, str]:
    """What the scores depend on, one digest per part. Independent of the number of processes."""
    weights, texts, images = (hashlib.blake2b(digest_size=16) for _ in range(3))
    for name, tensor in model.state_dict().items():
        weights.update(name.encode())
        weights.update(tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy())
    texts.update(json.dumps(token_ids).encode())
    for region in regions:
        for array in processor.encode_regions(region).values():
            array = np.ascontiguousarray(array)
            images.update(f"{array.dtype}{array.shape}".encode())
            images.update(array.view(np.uint8))
    return {
        "model": weights.hexdigest(),
        "texts": texts.hexdigest(),
        "regions": images.hexdigest(),
        "precision": precision,
        "blocks": f"{TEXTS_PER_BLOCK}x{IMAGES_PER_BLOCK}",
    }
