"""UC2's processor: text and region features in, one encoded batch out.

Importing this package makes `AutoProcessor` know `UC2Processor`. It is also saved as remote code beside every
model, so that a Hub folder loads without this package (`trust_remote_code=True`).
"""

from transformers import AutoProcessor

from .processing_uc2 import UC2Processor

UC2Processor.register_for_auto_class("AutoProcessor")
# AutoProcessor finds a class by its name in processor_config.json, among the registered classes. The key
# would be the model's config class, but this folder must load on its own, without the model's.
AutoProcessor.register(UC2Processor, UC2Processor, exist_ok=True)

__all__ = ["UC2Processor"]
