"""The UC2 networks and the detector that gives them regions.

Importing this package makes the `Auto` classes of transformers know them.
"""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForPreTraining,
    AutoModelForSequenceClassification,
    AutoModelForVisualQuestionAnswering,
)

from .configuration_uc2 import OBJECTIVES, UC2Config
from .configuration_uc2_detector import UC2RegionDetectorConfig
from .modeling_uc2 import (
    UC2ForPreTraining,
    UC2ForRetrieval,
    UC2ForVQA,
    UC2Model,
    UC2PreTrainedModel,
    UC2PreTrainingOutput,
    triplet_loss,
)
from .modeling_uc2_detector import UC2RegionDetector, UC2RegionDetectorOutput

AutoConfig.register("uc2", UC2Config, exist_ok=True)
AutoModel.register(UC2Config, UC2Model, exist_ok=True)
AutoModelForPreTraining.register(UC2Config, UC2ForPreTraining, exist_ok=True)
AutoModelForSequenceClassification.register(UC2Config, UC2ForRetrieval, exist_ok=True)
AutoModelForVisualQuestionAnswering.register(UC2Config, UC2ForVQA, exist_ok=True)
AutoConfig.register("uc2_region_detector", UC2RegionDetectorConfig, exist_ok=True)
AutoModel.register(UC2RegionDetectorConfig, UC2RegionDetector, exist_ok=True)

__all__ = [
    "OBJECTIVES",
    "UC2Config",
    "UC2ForPreTraining",
    "UC2ForRetrieval",
    "UC2ForVQA",
    "UC2Model",
    "UC2PreTrainedModel",
    "UC2PreTrainingOutput",
    "UC2RegionDetector",
    "UC2RegionDetectorConfig",
    "UC2RegionDetectorOutput",
    "triplet_loss",
]
