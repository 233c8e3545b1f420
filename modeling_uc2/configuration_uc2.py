"""Configuration of UC2 (Zhou et al., CVPR 2021): an XLM-R encoder over [caption tokens ; image regions]."""

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

# Every pre-training objective the network can compute; an `objective_id` is an index into this tuple.
# The paper's four come first: masked language modelling, image-text matching, masked region-to-token
# modelling, visual translation language modelling. The rest are its ablations: text-only translation
# language modelling, masked region classification (hard and KL), masked region feature regression.
OBJECTIVES = ("mlm", "itm", "mrtm", "vtlm", "tlm", "mrc", "mrc_kl", "mrfr")
# Objectives whose targets are words of a caption.
TEXT_OBJECTIVES = ("mlm", "vtlm", "tlm")


@strict
class UC2Config(PreTrainedConfig):
    r"""
    Configuration of [`UC2Model`] and its heads. Text fields carry XLM-R's names and, by default, the sizes
    of `xlm-roberta-base`; the others are:

    Args:
        type_vocab_size (`int`, defaults to 2): token types; 0 marks text, 1 marks regions.
        position_initializer_range (`float`, *optional*): standard deviation of fresh position and token-type
            embeddings; `initializer_range` if left out. A small model trained from scratch matches words with
            regions far sooner when this is smaller, since what a token *is* then outweighs where it stands.
        layer_norm_eps (`float`, defaults to 1e-5): LayerNorm epsilon of embeddings and heads.
        encoder_layer_norm_eps (`float`, defaults to 1e-12): LayerNorm epsilon inside the encoder layers, which
            the original implementation sets apart from `layer_norm_eps`.
        region_feature_size (`int`, defaults to 2048): width of one region's detector feature.
        num_region_classes (`int`, defaults to 1600): detector classes, read by the `mrc` and `mrc_kl` heads.
        objectives (`list[str]`): the pre-training objectives in use, out of `OBJECTIVES`. The region
            classification and regression heads exist only when one of their objectives is named.
        objective_weights (`dict[str, float]`, *optional*): factor of each objective's mean loss; 1 if unnamed.
        retrieval_margin (`float`, defaults to 0.2): margin of the triplet loss on sigmoid scores (paper A.1).
        tie_word_embeddings (`bool`, defaults to `True`): the LM head shares the word embeddings.

    Invalid values raise a `huggingface_hub.errors.StrictDataclassError` that names the field.
    """

    model_type = "uc2"

    vocab_size: int = 250002
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float | int = 0.1
    attention_probs_dropout_prob: float | int = 0.1
    max_position_embeddings: int = 514
    type_vocab_size: int = 2
    initializer_range: float | int = 0.02
    position_initializer_range: float | int | None = None
    layer_norm_eps: float | int = 1e-5
    encoder_layer_norm_eps: float | int = 1e-12
    pad_token_id: int | None = 1
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 2
    region_feature_size: int = 2048
    num_region_classes: int = 1600
    objectives: list[str] | tuple[str, ...] = ("mlm", "itm", "mrtm", "vtlm")
    objective_weights: dict[str, float | int] | None = None
    retrieval_margin: float | int = 0.2
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs):
        self.objectives = list(self.objectives)
        super().__post_init__(**kwargs)

    def validate_sizes(self):
        for name in (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "intermediate_size",
            "region_feature_size",
            "num_region_classes",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"UC2Config.{name} is {getattr(self, name)}; it must be at least 1.")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"UC2Config.hidden_size ({self.hidden_size}) must be a multiple of num_attention_heads "
                f"({self.num_attention_heads})."
            )
        if self.type_vocab_size < 2:
            raise ValueError(
                f"UC2Config.type_vocab_size is {self.type_vocab_size}; text and regions need at least 2 types."
            )
        if self.pad_token_id is None or not 0 <= self.pad_token_id < self.vocab_size:
            raise ValueError(
                f"UC2Config.pad_token_id is {self.pad_token_id}; positions are counted from it, "
                f"so it must lie in [0, vocab_size={self.vocab_size})."
            )
        if self.max_position_embeddings <= self.pad_token_id + 1:
            raise ValueError(
                f"UC2Config.max_position_embeddings is {self.max_position_embeddings}; positions start at "
                f"pad_token_id + 1 = {self.pad_token_id + 1}, so it must be larger."
            )

    def validate_probabilities(self):
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"UC2Config.{name} is {getattr(self, name)}; it must lie in [0, 1).")

    def validate_objectives(self):
        for field in ("objectives", "objective_weights"):
            unknown = set(getattr(self, field) or ()) - set(OBJECTIVES)
            if unknown:
                raise ValueError(f"UC2Config.{field} names {sorted(unknown)}; known are {list(OBJECTIVES)}.")


__all__ = ["OBJECTIVES", "UC2Config"]
