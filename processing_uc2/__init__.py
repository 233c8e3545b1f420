"""UC2's processor: text and region features in, one encoded batch out; and the region detector's image processor.

Importing this package makes `AutoProcessor` know `UC2Processor` and `AutoImageProcessor` know
`UC2DetectorImageProcessor`. They are also saved as remote code beside the models, so that a Hub folder loads
without this package (`trust_remote_code=True`).
"""

from transformers import AutoImageProcessor, AutoProcessor

from .image_processing_uc2_detector import UC2DetectorImageProcessor
from .processing_uc2 import UC2Processor

UC2Processor.register_for_auto_class("AutoProcessor")
# The Auto classes find a class by its name in the saved JSON, among the registered classes. The key would be
# the model's config class, but this folder must load on its own, without the model's.
AutoProcessor.register(UC2Processor, UC2Processor, exist_ok=True)
AutoImageProcessor.register(
    UC2DetectorImageProcessor, image_processor_classes={"pil": UC2DetectorImageProcessor}, exist_ok=True
)

__all__ = ["UC2DetectorImageProcessor", "UC2Processor"]
