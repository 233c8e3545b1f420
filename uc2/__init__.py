"""UC2: Universal Cross-lingual Cross-modal Vision-and-Language Pre-training (Zhou et al., CVPR 2021).

The library around the two Hub packages `modeling_uc2` and `processing_uc2`: reading captions and image
regions, masking, the pre-training data, the trainer, retrieval, question answering, checkpoint conversion.
"""

import modeling_uc2  # noqa: F401  (registers the Auto classes of transformers)
import processing_uc2  # noqa: F401
