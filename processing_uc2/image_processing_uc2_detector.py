"""Photographs -> input of the region detector: resized, BGR, mean subtracted, padded to one size."""

import numpy as np
from PIL import Image
from transformers import BatchFeature
from transformers.image_processing_backends import PilBackend

SMALLEST = 16  # pixels of an edge: one cell of the detector's feature map


class UC2DetectorImageProcessor(PilBackend):
    """
    Prepares images for `UC2RegionDetector` as the Caffe original did.

    The shorter edge becomes `size["shortest_edge"]` pixels, unless the longer one would exceed
    `size["longest_edge"]`; then the longer one becomes that. Channels are put in BGR order and `image_mean`
    (BGR, of values 0 to 255) is subtracted; there is no division by a standard deviation. The images of a
    batch are padded with zeros at the right and the bottom.

    Returns a `BatchFeature` with `pixel_values` (B, 3, H, W) float32, `image_sizes` (B, 2), height and width
    of each image within the padding, and `original_sizes` (B, 2), those of the given image; both int64.
    """

    model_input_names = ["pixel_values", "image_sizes", "original_sizes"]
    _auto_class = "AutoImageProcessor"

    do_convert_rgb = True
    do_resize = True
    size = {"shortest_edge": 800, "longest_edge": 1333}
    default_to_square = False
    resample = Image.Resampling.BILINEAR
    image_mean = [102.9801, 115.9465, 122.7717]

    def _preprocess(
        self, images: list[np.ndarray], do_resize, size, resample, image_mean, return_tensors, **kwargs
    ) -> BatchFeature:
        """`images`: (3, height, width) uint8 each."""
        for image in images:
            if image.dtype != np.uint8 or image.shape[0] != 3:
                raise ValueError(
                    f"An image is {image.dtype} with {image.shape[0]} channels; expected 3 channels of uint8."
                )
        original_sizes = [image.shape[1:] for image in images]
        if do_resize:
            images = [_resize(image, size.shortest_edge, size.longest_edge, resample) for image in images]
        image_sizes = [image.shape[1:] for image in images]
        height, width = np.max(image_sizes, axis=0)
        pixel_values = np.zeros((len(images), 3, height, width), np.float32)
        mean = np.asarray(image_mean, np.float32)[:, None, None]
        for row, image in zip(pixel_values, images, strict=True):
            row[:, : image.shape[1], : image.shape[2]] = image[::-1] - mean
        sizes = {"image_sizes": np.array(image_sizes), "original_sizes": np.array(original_sizes)}
        return BatchFeature({"pixel_values": pixel_values, **sizes}, tensor_type=return_tensors)


def _resize(image: np.ndarray, shortest: int, longest: int | None, resample: int) -> np.ndarray:
    height, width = image.shape[1:]
    scale = shortest / min(height, width)
    if longest is not None and scale * max(height, width) > longest:
        scale = longest / max(height, width)
    height, width = (max(SMALLEST, int(scale * length + 0.5)) for length in (height, width))
    resized = Image.fromarray(image.transpose(1, 2, 0)).resize((width, height), resample)
    return np.asarray(resized).transpose(2, 0, 1)


__all__ = ["UC2DetectorImageProcessor"]
