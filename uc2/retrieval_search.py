"""Search from the command line: a text's best images with a picture of them, or an image's best captions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from uc2.arguments import check_minimum
from uc2.data_error import DataError, Found
from uc2.retrieval import SearchHit, search, search_captions
from uc2.retrieval_report import save_search_grid


@dataclass
class SearchArguments:
    search: str | None = field(default=None, metadata={"help": "A text: find the best images of the stores."})
    search_image: str | None = field(
        default=None,
        metadata={"help": "An image id, or with a detector a picture: find the best captions of the eval_files."},
    )
    detector: str | None = field(
        default=None, metadata={"help": "Region detector (folder or Hub id) for a search_image that is a picture."}
    )
    search_images: str | None = field(
        default=None, metadata={"help": "Folder of pictures <image id>.jpg; saves a grid as search.png."}
    )
    top_k: int = field(default=10, metadata={"help": "Number of results."})


def search_and_show(
    find: SearchArguments, model, processor, store: Mapping, captions: Sequence[str], output_dir, **scoring_options
) -> list[SearchHit]:
    """Print the best images of the store for a text, or the best of the captions for an image, and return them."""
    check_minimum(find, top_k=1)
    options = {"top_k": find.top_k, "progress": True, **scoring_options}
    if find.search is None:
        if not captions:
            raise DataError(field="eval_files", found=Found("no caption"), expected="captions to search among")
        hits = search_captions(model, processor, _query_image(find, model, processor, store), captions, **options)
    else:
        if not find.search.strip():
            raise DataError(field="search", found=find.search, expected="a text")
        hits = search(model, processor, find.search, store, **options)
    for rank, hit in enumerate(hits, start=1):
        print(f"{rank:3d}  {hit.probability:.4f}  {hit.item}")
    if find.search is not None and find.search_images:
        path = Path(output_dir, "search.png")
        save_search_grid(hits, find.search_images, find.search, path)
        print(f"saved {path}")
    return hits


def _query_image(find: SearchArguments, model, processor, store: Mapping):
    """The image's row of the store, or the picture, with a detector attached to the processor."""
    if find.search_image in store:
        return store[find.search_image]
    if not Path(find.search_image).is_file():
        raise DataError(
            field="search_image", found=find.search_image, expected="an image of the region store, or a picture"
        )
    if find.detector is None:
        raise DataError(field="detector", found=None, expected=f"one to find the regions of {find.search_image}")
    # Imported here: searching among stored regions needs no detector.
    from uc2.region_extractors import UC2DetectorImageProcessor, load_detector

    processor.attach_region_detector(load_detector(find.detector).to(model.device), UC2DetectorImageProcessor())
    try:
        with Image.open(find.search_image) as picture:
            return picture.convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise DataError(file=find.search_image, found=Found("no picture"), expected="a picture file") from error
