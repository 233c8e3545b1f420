"""UC2 networks (Zhou et al., CVPR 2021, section 3): one XLM-R encoder over [caption tokens ; image regions].

Shapes: B examples, T text tokens, R regions, F feature width, H hidden size, V vocabulary, K region classes.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel, XLMRobertaForMaskedLM, XLMRobertaModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutput,
    BaseModelOutputWithPooling,
    ModelOutput,
    SequenceClassifierOutput,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, logging
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_uc2 import OBJECTIVES, TEXT_OBJECTIVES, UC2Config

logger = logging.get_logger(__name__)

IGNORED = -100
TEXT_TYPE, REGION_TYPE = 0, 1
# Target positions whose V logits are held at once: 256 x 250,002 float32 values are 256 MB.
LOGIT_ROWS = 256
# Index of (B, N) for heads that read the pooled first token alone.
FIRST_TOKEN = (slice(None), slice(0, 1))
# Rounding in float16 stores and in x / width may push a box this far over the image's edge.
BOX_TOLERANCE = 1e-3
AUTO_MAP = {
    "AutoConfig": "configuration_uc2.UC2Config",
    "AutoModel": "modeling_uc2.UC2Model",
    "AutoModelForPreTraining": "modeling_uc2.UC2ForPreTraining",
    "AutoModelForSequenceClassification": "modeling_uc2.UC2ForRetrieval",
    "AutoModelForVisualQuestionAnswering": "modeling_uc2.UC2ForVQA",
}


@dataclass
class UC2PreTrainingOutput(ModelOutput):
    """
    Args:
        loss (`()`): sum over objectives of weight x mean loss over the objective's targets.
        objective_loss (`(len(OBJECTIVES),)`): each objective's loss summed over this batch's targets, detached.
        objective_items (`(len(OBJECTIVES),)`): the number of those targets.
        objective_correct (`(len(OBJECTIVES),)`): targets predicted right; only in evaluation mode, and 0 for
            `mrc_kl` and `mrfr`, which have no right answer.
        example_loss, example_items, example_correct (`(B,)`): the same, summed within each example.
        prediction_logits: LM-head logits, `(targets, V)` in row-major order of `[labels ; region_labels]`, or
            `(B, T + R, V)` when no labels are given; only if asked for, or if there is nothing else to compute.
        itm_logits (`(B, 2)`): image-text matching; index 1 is "match".
        hidden_states, attentions: as in every transformers model.
    """

    loss: torch.FloatTensor | None = None
    objective_loss: torch.FloatTensor | None = None
    objective_items: torch.LongTensor | None = None
    objective_correct: torch.LongTensor | None = None
    example_loss: torch.FloatTensor | None = None
    example_items: torch.LongTensor | None = None
    example_correct: torch.LongTensor | None = None
    prediction_logits: torch.FloatTensor | None = None
    itm_logits: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


class UC2TextEmbeddings(nn.Module):
    """XLM-R's embeddings: LayerNorm(word + position + token type)."""

    def __init__(self, config: UC2Config):
        super().__init__()
        self.padding_idx = config.pad_token_id
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=self.padding_idx)
        self.position_embeddings = nn.Embedding(
            config.max_position_embeddings, config.hidden_size, padding_idx=self.padding_idx
        )
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, input_ids=None, position_ids=None, token_type_ids=None, inputs_embeds=None) -> torch.Tensor:
        if inputs_embeds is None:
            inputs_embeds = self.word_embeddings(input_ids)
        if position_ids is None:
            position_ids = self.count_positions(input_ids, inputs_embeds)
        if token_type_ids is None:
            token_type_ids = torch.full((1, 1), TEXT_TYPE, device=inputs_embeds.device)
        token_types = self.token_type_embeddings(token_type_ids)
        embeddings = inputs_embeds + self.position_embeddings(position_ids) + token_types
        return self.dropout(self.LayerNorm(embeddings))

    def count_positions(self, input_ids, inputs_embeds) -> torch.LongTensor:
        """Positions run from pad + 1 over the tokens that are not padding, as XLM-R's do; padding stays at pad."""
        if input_ids is None:
            real = inputs_embeds.new_ones(inputs_embeds.shape[:2], dtype=torch.long)
        else:
            real = input_ids.ne(self.padding_idx).long()
        return real.cumsum(dim=1) * real + self.padding_idx


class UC2RegionEmbeddings(nn.Module):
    """LayerNorm(LayerNorm(W f) + LayerNorm(W' l) + token type 1), paper section 3.2."""

    def __init__(self, config: UC2Config):
        super().__init__()
        self.feature_projection = nn.Linear(config.region_feature_size, config.hidden_size)
        self.feature_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.location_projection = nn.Linear(7, config.hidden_size)
        self.location_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mask_embedding = nn.Parameter(torch.zeros(config.region_feature_size))
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, region_features, region_boxes, token_type, region_mask=None) -> torch.Tensor:
        dtype = self.feature_projection.weight.dtype
        features, boxes = region_features.to(dtype), region_boxes.to(dtype)
        if region_mask is None:
            # The mask vector takes part in every step, so that its gradient is 0 and never absent (DDP).
            region_mask = features.new_zeros(features.shape[:2])
        features = features + region_mask.unsqueeze(-1).to(dtype) * self.mask_embedding
        size = boxes[..., 2:] - boxes[..., :2]
        location = torch.cat([boxes, size, size.prod(dim=-1, keepdim=True)], dim=-1)
        embeddings = (
            self.feature_layer_norm(self.feature_projection(features))
            + self.location_layer_norm(self.location_projection(location))
            + token_type
        )
        return self.dropout(self.LayerNorm(embeddings))


def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Plain attention that also returns its weights; query, key, value are (B, heads, N, H / heads)."""
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    # In float32, as the fused kernels do; no conversion if the model is in float32.
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class UC2SelfAttention(nn.Module):
    def __init__(self, config: UC2Config, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.is_causal = False  # read by the sdpa interface, which would otherwise mask the future
        self.head_size = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_size**-0.5
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout_prob = config.attention_probs_dropout_prob

    def forward(self, hidden_states, attention_mask=None, **kwargs: Unpack[TransformersKwargs]):
        split = (*hidden_states.shape[:-1], -1, self.head_size)
        query, key, value = (
            projection(hidden_states).view(split).transpose(1, 2)
            for projection in (self.query, self.key, self.value)
        )
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        dropout = self.dropout_prob if self.training else 0.0
        output, weights = attend(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )
        return output.reshape(hidden_states.shape).contiguous(), weights


class UC2ResidualOutput(nn.Module):
    """LayerNorm(residual + dropout(W x)): the end of both sub-layers of an encoder layer."""

    def __init__(self, config: UC2Config, input_size: int):
        super().__init__()
        self.dense = nn.Linear(input_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.encoder_layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return self.LayerNorm(self.dropout(self.dense(hidden_states)) + residual)


class UC2Attention(nn.Module):
    def __init__(self, config: UC2Config, layer_idx: int):
        super().__init__()
        self.self = UC2SelfAttention(config, layer_idx)
        self.output = UC2ResidualOutput(config, config.hidden_size)

    def forward(self, hidden_states, attention_mask=None, read_index=None, **kwargs: Unpack[TransformersKwargs]):
        attended, _ = self.self(hidden_states, attention_mask, **kwargs)
        if read_index is not None:
            attended, hidden_states = attended[read_index], hidden_states[read_index]
        return self.output(attended, hidden_states)


class UC2Intermediate(nn.Module):
    def __init__(self, config: UC2Config):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.activation(self.dense(hidden_states))


class UC2Layer(GradientCheckpointingLayer):
    """One encoder layer, with XLM-R's parameter names."""

    def __init__(self, config: UC2Config, layer_idx: int):
        super().__init__()
        self.attention = UC2Attention(config, layer_idx)
        self.intermediate = UC2Intermediate(config)
        self.output = UC2ResidualOutput(config, config.intermediate_size)

    def forward(self, hidden_states, attention_mask=None, read_index=None, **kwargs: Unpack[TransformersKwargs]):
        """(B, N, H) -> (B, N, H); 0 outside of `read_index`, if that is given."""
        attended = self.attention(hidden_states, attention_mask, read_index, **kwargs)
        output = self.output(self.intermediate(attended), attended)
        if read_index is None:
            return output
        whole = output.new_zeros(hidden_states.shape)
        whole[read_index] = output
        return whole


class UC2Encoder(nn.Module):
    def __init__(self, config: UC2Config):
        super().__init__()
        self.layer = nn.ModuleList([UC2Layer(config, i) for i in range(config.num_hidden_layers)])

    def forward(self, hidden_states, attention_mask=None, read_index=None, **kwargs: Unpack[TransformersKwargs]):
        *layers, last = self.layer
        for layer in layers:
            hidden_states = layer(hidden_states, attention_mask, **kwargs)
        hidden_states = last(hidden_states, attention_mask, read_index=read_index, **kwargs)
        return BaseModelOutput(last_hidden_state=hidden_states)


class UC2Pooler(nn.Module):
    """tanh(W h) of the first token, (B, N, H) -> (B, H)."""

    def __init__(self, config: UC2Config):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.dense(hidden_states[:, 0]))


class _VocabularyLoss(torch.autograd.Function):
    """Cross-entropy over the vocabulary whose N x V logits and their gradient never exist as a whole.

    The gradients are made next to the loss, `LOGIT_ROWS` rows at a time, while a row's probabilities are at
    hand: nothing is computed twice, and all chunks add into one gradient of the weight.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, factors):
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        losses = hidden.new_zeros(len(targets), dtype=torch.float32)
        hidden_grad = torch.zeros_like(hidden) if needs_hidden else None
        # The first chunk overwrites what is in it: filling 768 MB with zeros takes as long as a layer.
        empty = torch.empty_like if len(targets) else torch.zeros_like
        weight_grad = empty(weight) if needs_weight else None
        bias_grad = torch.zeros_like(bias) if needs_bias else None
        for start in range(0, len(targets), LOGIT_ROWS):
            rows = slice(start, start + LOGIT_ROWS)
            chunk, target = hidden[rows], targets[rows].unsqueeze(1)
            values = F.linear(chunk, weight, bias).float()
            at_target = values.gather(1, target).squeeze(1)
            largest = values.amax(dim=1)
            # In place: `values` turns from logits into exponentials, then into the gradient of the logits.
            total = values.sub_(largest.unsqueeze(1)).exp_().sum(dim=1)
            losses[rows] = total.log() + largest - at_target
            values.mul_((factors[rows] / total).unsqueeze(1))
            values.scatter_add_(1, target, -factors[rows].unsqueeze(1))
            logit_grad = values.to(weight.dtype)
            if needs_hidden:
                hidden_grad[rows] = logit_grad @ weight
            if needs_weight:
                weight_grad.addmm_(logit_grad.t(), chunk, beta=1 if start else 0)
            if needs_bias:
                bias_grad += logit_grad.sum(dim=0)
        ctx.save_for_backward(hidden_grad, weight_grad, bias_grad)
        ctx.mark_non_differentiable(losses)
        return (losses * factors).sum(), losses

    @staticmethod
    @once_differentiable
    def backward(ctx, loss_grad, _):
        gradients = ctx.saved_tensors
        # A plain `loss.backward()` sends 1, and the weight's gradient is 768 MB. Only the CPU can look for free.
        if loss_grad.device.type != "cpu" or loss_grad != 1:
            gradients = [None if gradient is None else gradient.mul_(loss_grad) for gradient in gradients]
        return *gradients, None, None


class _TiedTable(torch.autograd.Function):
    """Word embeddings looked up in a table that the LM head reads too: one gradient for both.

    The LM head's gradient of the table is dense. Autograd would add another dense one for the lookup, 768 MB of
    almost nothing but zeros; here the rows looked up are added to the first in place.
    """

    @staticmethod
    def forward(ctx, weight, ids, padding_idx):
        ctx.save_for_backward(ids)
        ctx.padding_idx = padding_idx
        return F.embedding(ids, weight), weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, rows_grad, table_grad):
        (ids,) = ctx.saved_tensors
        real = ids != ctx.padding_idx
        return table_grad.index_put_((ids[real],), rows_grad[real].to(table_grad.dtype), accumulate=True), None, None


class UC2Decoder(nn.Linear):
    """Hidden states to vocabulary logits, or to the loss over them."""

    def forward(self, hidden_states, targets=None, factors=None, table=None):
        """(…, H) -> (…, V); or, with targets (N,) and factors (N,), (N, H) -> the sum of factor x cross-entropy
        and, without gradient, the N cross-entropies. `table` is read in place of the weight."""
        table = self.weight if table is None else table
        if targets is None:
            return F.linear(hidden_states, table, self.bias)
        dtype = self.product_dtype()
        with torch.autocast(hidden_states.device.type, enabled=False):
            return _VocabularyLoss.apply(
                hidden_states.to(dtype), table.to(dtype), self.bias.to(dtype), targets, factors
            )

    def product_dtype(self) -> torch.dtype:
        device_type = self.weight.device.type
        return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else self.weight.dtype


class UC2LMHead(nn.Module):
    """XLM-R's LM head; its decoder is tied to the word embeddings. Arguments and results as `UC2Decoder`'s."""

    def __init__(self, config: UC2Config):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.decoder = UC2Decoder(config.hidden_size, config.vocab_size)

    def forward(self, hidden_states, targets=None, factors=None, table=None):
        return self.decoder(self.layer_norm(F.gelu(self.dense(hidden_states))), targets, factors, table)

    def makes_loss(self) -> bool:
        """Whether to ask for the loss in place of logits. Not in float16, which needs the loss scale before
        gradients are rounded, and only the backward pass knows it; and not through an adapter's decoder."""
        return type(self.decoder) is UC2Decoder and self.decoder.product_dtype() != torch.float16


class UC2RegionClassifier(nn.Module):
    """Detector-class logits of a region, for MRC and MRC-KL (paper Table 3). (…, H) -> (…, K)"""

    def __init__(self, config: UC2Config):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.encoder_layer_norm_eps)
        self.decoder = nn.Linear(config.hidden_size, config.num_region_classes)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.layer_norm(F.gelu(self.dense(hidden_states))))


class UC2RegionRegressor(nn.Module):
    """The masked region's feature, for MRFR; the decoder is the transposed feature projection. (…, H) -> (…, F)"""

    def __init__(self, config: UC2Config):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.encoder_layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.region_feature_size))

    def forward(self, hidden_states: torch.Tensor, projection_weight: torch.Tensor) -> torch.Tensor:
        return F.linear(self.layer_norm(F.gelu(self.dense(hidden_states))), projection_weight.t(), self.bias)


class UC2PreTrainedModel(PreTrainedModel):
    config: UC2Config
    base_model_prefix = "uc2"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _no_split_modules = ["UC2TextEmbeddings", "UC2RegionEmbeddings", "UC2Layer"]
    _can_record_outputs = {"hidden_states": UC2Layer, "attentions": UC2SelfAttention}

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, UC2RegionEmbeddings):
            init.normal_(module.mask_embedding, std=self.config.initializer_range)
        elif isinstance(module, UC2TextEmbeddings) and self.config.position_initializer_range is not None:
            for table in (module.position_embeddings, module.token_type_embeddings):
                init.normal_(table.weight, std=self.config.position_initializer_range)
        elif isinstance(module, UC2RegionRegressor):
            init.zeros_(module.bias)

    def save_pretrained(self, save_directory, *args, is_main_process=True, push_to_hub=False, **kwargs):
        """Also writes the two source files of this package, so that the folder loads by itself with
        `trust_remote_code=True` through every Auto class, whichever head was saved."""
        hub_options = ("repo_id", "commit_message", "commit_description", "private", "revision", "create_pr")
        hub = {name: kwargs.pop(name) for name in hub_options if name in kwargs}
        self.config.auto_map = {**(getattr(self.config, "auto_map", None) or {}), **AUTO_MAP}
        if is_main_process:
            Path(save_directory).mkdir(parents=True, exist_ok=True)
            for source in (Path(__file__).with_name("configuration_uc2.py"), Path(__file__)):
                if source.parent.resolve() != Path(save_directory).resolve():
                    shutil.copyfile(source, Path(save_directory, source.name))
        super().save_pretrained(save_directory, *args, is_main_process=is_main_process, **kwargs)
        if push_to_hub and is_main_process:
            # Not left to `super`: it uploads what it wrote itself, which the source files are not.
            self.push_to_hub(hub.pop("repo_id", Path(save_directory).name), token=kwargs.get("token"), **hub)

    @classmethod
    def from_text_encoder(cls, name_or_path: str, **config_overrides):
        """A UC2 whose text part, pooler and LM head are those of an XLM-R checkpoint of any size (paper 3.2).

        Args:
            name_or_path: Hub id or folder of an `xlm-roberta` model.
            config_overrides: fields of `UC2Config`, for example `region_feature_size=1024`.

        The region encoder, the row of token type 1 and the task heads are freshly initialised.
        """
        text_model = XLMRobertaModel.from_pretrained(name_or_path)
        source = text_model.config
        if source.model_type != "xlm-roberta":
            raise ValueError(f"{name_or_path} holds a {source.model_type!r} model; expected 'xlm-roberta'.")
        inherited = (
            "vocab_size hidden_size num_hidden_layers num_attention_heads intermediate_size hidden_act "
            "hidden_dropout_prob attention_probs_dropout_prob max_position_embeddings initializer_range "
            "layer_norm_eps pad_token_id bos_token_id eos_token_id"
        ).split()
        fields = {name: getattr(source, name) for name in inherited}
        # XLM-R has one epsilon: with it, the text-only output is XLM-R's own.
        fields["encoder_layer_norm_eps"] = source.layer_norm_eps
        model = cls(UC2Config(**{**fields, **config_overrides}))

        weights = text_model.state_dict()
        token_types = model.base_model.embeddings.token_type_embeddings.weight.detach().clone()
        token_types[TEXT_TYPE] = weights["embeddings.token_type_embeddings.weight"][TEXT_TYPE]
        weights["embeddings.token_type_embeddings.weight"] = token_types
        report = model.base_model.load_state_dict(weights, strict=False)
        fresh = [key for key in report.missing_keys if not key.startswith("region_embeddings.")]
        if fresh or report.unexpected_keys:
            raise ValueError(
                f"{name_or_path} does not fit UC2: missing {fresh}, unexpected {report.unexpected_keys}."
            )
        if hasattr(model, "lm_head"):
            weights = XLMRobertaForMaskedLM.from_pretrained(name_or_path).lm_head.state_dict()
            del weights["bias"]  # a second name of decoder.bias; FSDP2 shards no tensor that two modules hold
            model.lm_head.load_state_dict(weights)
        model.tie_weights()
        return model


class UC2Model(UC2PreTrainedModel):
    """The encoder over [text ; regions]; either part may be left out (paper section 3.2)."""

    def __init__(self, config: UC2Config):
        super().__init__(config)
        config.validate()  # from_pretrained(path, field=value) sets fields after the config has checked itself
        self.embeddings = UC2TextEmbeddings(config)
        self.region_embeddings = UC2RegionEmbeddings(config)
        self.encoder = UC2Encoder(config)
        self.pooler = UC2Pooler(config)
        self.post_init()

    def get_input_embeddings(self):
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value):
        self.embeddings.word_embeddings = value

    def embed_text(self, input_ids=None, position_ids=None, token_type_ids=None, inputs_embeds=None):
        """(B, T) ids, or (B, T, H) word embeddings, -> (B, T, H) as the encoder reads them."""
        return self.embeddings(input_ids, position_ids, token_type_ids, inputs_embeds)

    def embed_regions(self, region_features, region_boxes, region_mask=None):
        """(B, R, F) features, (B, R, 4) boxes, (B, R) True where masked, -> (B, R, H) as the encoder reads them."""
        # Through the module, whose hooks gather the table where it is sharded (ZeRO-3).
        region_type = torch.full((1,), REGION_TYPE, device=region_features.device)
        token_type = self.embeddings.token_type_embeddings(region_type)
        return self.region_embeddings(region_features, region_boxes, token_type, region_mask)

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        region_features: torch.Tensor | None = None,
        region_boxes: torch.Tensor | None = None,
        region_attention_mask: torch.Tensor | None = None,
        region_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        read_index: tuple | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        """
        Args:
            input_ids (`(B, T)`): caption tokens; or `inputs_embeds` (`(B, T, H)`) in their place.
            attention_mask (`(B, T)`): 1 for real tokens; all real if left out.
            token_type_ids (`(B, T)`): 0 if left out.
            position_ids (`(B, T)`): counted from pad + 1 over real tokens if left out. VTLM restarts them.
            region_features (`(B, R, F)`): any float type. A masked region's feature is zeroed by the data side.
            region_boxes (`(B, R, 4)`): x1, y1, x2, y2 in [0, 1] of the image's width and height.
            region_attention_mask (`(B, R)`): 1 for real regions; all real if left out.
            region_mask (`(B, R)`): true where the learnt mask vector is added to the feature.
            read_index: index of `(B, T + R)`, the first position of each row included: where the caller reads
                `last_hidden_state`. It stays 0 elsewhere, which spares the last layer most of its work.
                Without effect when hidden states are asked for.

        Returns `last_hidden_state` `(B, T + R, H)`, text first, and `pooler_output` `(B, H)`.
        Raises `ValueError` for shapes that do not fit together; NaN features, boxes outside the image and
        examples without any token or region are looked for on the CPU only, where it needs no synchronisation.
        """
        _check_text(self.config, input_ids, inputs_embeds, attention_mask, token_type_ids, position_ids)
        _check_regions(self.config, region_features, region_boxes, region_attention_mask, region_mask)
        _check_parts(input_ids, inputs_embeds, region_features)
        parts, masks = [], []
        if input_ids is not None or inputs_embeds is not None:
            parts.append(self.embed_text(input_ids, position_ids, token_type_ids, inputs_embeds))
            masks.append(_mask_or_ones(attention_mask, parts[-1]))
        if region_features is not None:
            parts.append(self.embed_regions(region_features, region_boxes, region_mask))
            masks.append(_mask_or_ones(region_attention_mask, parts[-1]))
        sequence, mask = torch.cat(parts, dim=1), torch.cat(masks, dim=1)
        if _reads_values(sequence):
            _check_values(mask, region_features, region_boxes, masks[-1])

        encoder_mask = create_bidirectional_mask(
            config=self.config, inputs_embeds=sequence, attention_mask=mask
        )
        if kwargs.get("output_hidden_states", self.config.output_hidden_states):
            read_index = None
        hidden_states = self.encoder(sequence, encoder_mask, read_index, **kwargs).last_hidden_state
        return BaseModelOutputWithPooling(
            last_hidden_state=hidden_states, pooler_output=self.pooler(hidden_states)
        )


def _mask_or_ones(mask: torch.Tensor | None, embeddings: torch.Tensor) -> torch.Tensor:
    if mask is None:
        return embeddings.new_ones(embeddings.shape[:2], dtype=torch.long)
    return mask.to(device=embeddings.device, dtype=torch.long)


def _reads_values(tensor: torch.Tensor) -> bool:
    """Whether looking at a tensor's values costs no synchronisation and no graph break."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def _check_ids(name: str, ids: torch.Tensor | None, size: int, ignored: int | None = None):
    """Every id lies in [0, size), or is the ignored one."""
    if ids is None or not _reads_values(ids):
        return
    outside = (ids < 0) | (ids >= size)
    if ignored is not None:
        outside &= ids != ignored
    if bool(outside.any()):
        place = outside.nonzero()[0].tolist()
        raise ValueError(f"{name}{place} is {int(ids[tuple(place)])}; expected an id in [0, {size}).")


def _check_parts(input_ids, inputs_embeds, region_features):
    text = input_ids if input_ids is not None else inputs_embeds
    if text is None and region_features is None:
        raise ValueError("UC2 got neither text (input_ids or inputs_embeds) nor regions (region_features).")
    # Of `.shape`, as `len()` of a tensor would fix the batch size of a traced graph.
    if text is not None and region_features is not None and text.shape[0] != region_features.shape[0]:
        raise ValueError(f"The batch has {len(text)} texts but {len(region_features)} region sets.")


def _check_text(config, input_ids, inputs_embeds, attention_mask, token_type_ids, position_ids):
    if input_ids is not None and inputs_embeds is not None:
        raise ValueError("UC2 takes input_ids or inputs_embeds, not both.")
    text = input_ids if input_ids is not None else inputs_embeds
    if input_ids is not None and input_ids.dim() != 2:
        raise ValueError(f"input_ids is {tuple(input_ids.shape)}; expected (batch, tokens).")
    if inputs_embeds is not None and (inputs_embeds.dim() != 3 or inputs_embeds.shape[2] != config.hidden_size):
        raise ValueError(
            f"inputs_embeds is {tuple(inputs_embeds.shape)}; expected (batch, tokens, "
            f"hidden_size={config.hidden_size})."
        )
    given = {"attention_mask": attention_mask, "token_type_ids": token_type_ids, "position_ids": position_ids}
    for name, tensor in given.items():
        if tensor is None:
            continue
        if text is None:
            raise ValueError(f"{name} is given without input_ids or inputs_embeds.")
        fits = tensor.shape == text.shape[:2] or (name == "position_ids" and tensor.shape == (1, text.shape[1]))
        if not fits:
            raise ValueError(f"{name} is {tuple(tensor.shape)}; the text is {tuple(text.shape[:2])}.")
    longest = config.max_position_embeddings - config.pad_token_id - 1
    if text is not None and position_ids is None and text.shape[1] > longest:
        raise ValueError(f"The text has {text.shape[1]} tokens; UC2 has positions for {longest}.")
    _check_ids("input_ids", input_ids, config.vocab_size)
    _check_ids("token_type_ids", token_type_ids, config.type_vocab_size)
    _check_ids("position_ids", position_ids, config.max_position_embeddings)


def _check_regions(config, region_features, region_boxes, region_attention_mask, region_mask):
    given = {
        "region_boxes": region_boxes,
        "region_attention_mask": region_attention_mask,
        "region_mask": region_mask,
    }
    if region_features is None:
        for name, tensor in given.items():
            if tensor is not None:
                raise ValueError(f"{name} is given without region_features.")
        return
    if region_features.dim() != 3 or region_features.shape[2] != config.region_feature_size:
        raise ValueError(
            f"region_features is {tuple(region_features.shape)}; expected (batch, regions, "
            f"region_feature_size={config.region_feature_size})."
        )
    if region_boxes is None:
        raise ValueError("region_features needs region_boxes: (batch, regions, 4) in [0, 1].")
    for name, tensor in given.items():
        expected = tuple(region_features.shape[:2]) + ((4,) if name == "region_boxes" else ())
        if tensor is not None and tuple(tensor.shape) != expected:
            raise ValueError(f"{name} is {tuple(tensor.shape)}; region_features ask for {expected}.")


def _check_values(mask, region_features, region_boxes, region_attention_mask):
    empty = (mask.sum(dim=1) == 0).nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"Examples {empty} of the batch have neither text nor regions.")
    if region_features is None:
        return
    real = region_attention_mask.bool()
    # One non-finite value makes the row's sum non-finite: a cheaper scan than isfinite of every element.
    finite = region_features.sum(dim=-1, dtype=torch.float32).isfinite()
    if not bool(finite.logical_or(~real).all()):
        example, region = (~finite & real).nonzero()[0].tolist()
        raise ValueError(f"region_features[{example}, {region}] holds NaN or infinite values.")
    low, high = region_boxes.amin(dim=-1), region_boxes.amax(dim=-1)
    inside = (low >= -BOX_TOLERANCE) & (high <= 1 + BOX_TOLERANCE)
    inside &= (region_boxes[..., 2:] >= region_boxes[..., :2]).all(dim=-1)
    if not bool(inside.logical_or(~real).all()):
        example, region = (~inside & real).nonzero()[0].tolist()
        raise ValueError(
            f"region_boxes[{example}, {region}] is {region_boxes[example, region].tolist()}; "
            "expected 0 <= x1 <= x2 <= 1 and 0 <= y1 <= y2 <= 1."
        )


class UC2ForPreTraining(UC2PreTrainedModel):
    """All pre-training objectives over one mixed batch (paper section 3.3).

    One LM head serves MLM, VTLM and MRTM; every head runs in every step, on an empty selection if need be, so
    that all parameters always have a gradient and data-parallel ranks stay in step.
    """

    _tied_weights_keys = {"lm_head.decoder.weight": "uc2.embeddings.word_embeddings.weight"}

    def __init__(self, config: UC2Config):
        super().__init__(config)
        self.uc2 = UC2Model(config)
        self.lm_head = UC2LMHead(config)
        self.itm_head = nn.Linear(config.hidden_size, 2)
        if {"mrc", "mrc_kl"} & set(config.objectives):
            self.region_classifier = UC2RegionClassifier(config)
        if "mrfr" in config.objectives:
            self.region_regressor = UC2RegionRegressor(config)
        self.post_init()

    def get_output_embeddings(self):
        return self.lm_head.decoder

    def set_output_embeddings(self, new_embeddings):
        """Takes over the parameters only: resizing brings a plain `nn.Linear`."""
        decoder = self.lm_head.decoder
        decoder.weight, decoder.bias = new_embeddings.weight, new_embeddings.bias
        decoder.out_features = len(new_embeddings.weight)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        region_features: torch.Tensor | None = None,
        region_boxes: torch.Tensor | None = None,
        region_attention_mask: torch.Tensor | None = None,
        region_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        region_labels: torch.LongTensor | None = None,
        itm_labels: torch.LongTensor | None = None,
        region_class_labels: torch.LongTensor | None = None,
        region_class_probs: torch.Tensor | None = None,
        region_feature_targets: torch.Tensor | None = None,
        objective_ids: torch.LongTensor | None = None,
        num_items_in_batch: torch.Tensor | None = None,
        output_prediction_logits: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> UC2PreTrainingOutput:
        """
        Model inputs as in `UC2Model`. Any set of labels may be given; -100 = ignored:
            labels (`(B, T)`): vocabulary ids of masked tokens (MLM, VTLM, TLM).
            region_labels (`(B, R)`): a sub-word id of each masked region's detected label (MRTM).
            itm_labels (`(B,)`): 1 where text and image belong together, 0 where not (ITM).
            region_class_labels (`(B, R)`): detected class (MRC).
            region_class_probs (`(B, R, K)`): the detector's class distribution; all-zero rows ignored (MRC-KL).
            region_feature_targets (`(B, R, F)`): original features, read where `region_mask` is true (MRFR) and,
                with `objective_ids`, in rows of that objective.
            objective_ids (`(B,)`): index in `OBJECTIVES`; tells VTLM and TLM rows of `labels` from MLM's.
            num_items_in_batch (`(len(OBJECTIVES),)`): targets of each objective in the whole update, over all
                micro-batches and processes; this batch's own if left out.
            output_prediction_logits: whether to return them; by default only when no labels are given.
        """
        _check_text(self.config, input_ids, inputs_embeds, attention_mask, token_type_ids, position_ids)
        _check_regions(self.config, region_features, region_boxes, region_attention_mask, region_mask)
        _check_parts(input_ids, inputs_embeds, region_features)
        text = input_ids if input_ids is not None else inputs_embeds
        token_targets = self._join_token_targets(text, region_features, labels, region_labels)
        other_targets = (region_class_labels, region_class_probs, region_feature_targets)
        has_targets = any(target is not None for target in (labels, region_labels, itm_labels, *other_targets))
        read_index = None
        if has_targets and all(target is None for target in other_targets):
            read = token_targets != IGNORED
            read[:, 0] = True
            read_index = read.nonzero(as_tuple=True)
        table = None
        if has_targets and input_ids is not None and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            inputs_embeds, table = self._look_up(input_ids)
        if table is not None:
            if position_ids is None:
                position_ids = self.uc2.embeddings.count_positions(input_ids, None)
            input_ids = None
        outputs = self.uc2(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            region_features=region_features,
            region_boxes=region_boxes,
            region_attention_mask=region_attention_mask,
            region_mask=region_mask,
            inputs_embeds=inputs_embeds,
            read_index=read_index,
            return_dict=True,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        itm_logits = self.itm_head(outputs.pooler_output)
        result = UC2PreTrainingOutput(
            itm_logits=itm_logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )
        if not has_targets:
            if output_prediction_logits is None or output_prediction_logits:
                result.prediction_logits = self.lm_head(hidden)
            return result

        if num_items_in_batch is not None and num_items_in_batch.shape != (len(OBJECTIVES),):
            raise ValueError(
                f"num_items_in_batch is {tuple(num_items_in_batch.shape)}; expected one count for each of "
                f"{', '.join(OBJECTIVES)}, as UC2Trainer passes them."
            )
        text_length = 0 if text is None else text.shape[1]
        items = _ObjectiveItems(hidden, self.config.objective_weights, num_items_in_batch, not self.training)
        objectives = _token_objectives(token_targets, text_length, objective_ids)
        result.prediction_logits = self._add_token_items(
            items, hidden, token_targets, objectives, bool(output_prediction_logits), table
        )
        self._add_matching_items(items, itm_logits, itm_labels)
        self._add_ablation_items(
            items, hidden[:, text_length:], *other_targets, _rows_of("mrfr", region_mask, objective_ids)
        )
        items.summarise_into(result)
        return result

    def _join_token_targets(self, text, regions, labels, region_labels) -> torch.LongTensor:
        """(B, T + R): the word asked for at each position, or -100."""
        given = {"labels": (labels, text), "region_labels": (region_labels, regions)}
        parts = []
        for name, (target, states) in given.items():
            if target is not None and (states is None or target.shape != states.shape[:2]):
                found = "absent" if states is None else tuple(states.shape[:2])
                raise ValueError(f"{name} is {tuple(target.shape)}; the inputs that it labels are {found}.")
            _check_ids(name, target, self.config.vocab_size, ignored=IGNORED)
            if states is not None:
                nothing = states.new_full(states.shape[:2], IGNORED, dtype=torch.long)
                parts.append(nothing if target is None else target)
        return torch.cat(parts, dim=1)

    def _look_up(self, input_ids):
        """Word embeddings (B, T, H) and the table for the LM head, which then share one gradient; or None, None
        where the two are not one plain parameter: untied, frozen, adapted or sharded."""
        words, decoder = self.get_input_embeddings(), self.lm_head.decoder
        if type(words) is not nn.Embedding or type(decoder) is not UC2Decoder or words.weight is not decoder.weight:
            return None, None
        weight = words.weight
        if type(weight) is not nn.Parameter or weight.dim() != 2 or not weight.requires_grad:
            return None, None
        return _TiedTable.apply(weight, input_ids, words.padding_idx)

    def _add_token_items(self, items, hidden, token_targets, objectives, keep_logits: bool, table):
        """MLM, VTLM, TLM (text positions) and MRTM (regions): one cross-entropy over the positions with a target.
        Returns their logits if they are to be kept."""
        picked = token_targets != IGNORED
        rows, objectives = picked.nonzero()[:, 0], objectives[picked]
        hidden, targets = hidden[picked], token_targets[picked]
        if not keep_logits and self.training and torch.is_grad_enabled() and self.lm_head.makes_loss():
            loss, losses = self.lm_head(hidden, targets, items.factors(objectives), table)
            items.add(rows, objectives, losses, loss=loss)
            return None
        losses, hits, logits = [], [], []
        chunk = max(len(targets), 1) if keep_logits else LOGIT_ROWS
        for h, t in zip(hidden.split(chunk), targets.split(chunk), strict=True):
            logits.append(self.lm_head(h, table=table))
            losses.append(F.cross_entropy(logits[-1].float(), t, reduction="none"))
            hits.append(logits[-1].argmax(dim=-1) == t)
            if not keep_logits:
                logits.clear()
        items.add(rows, objectives, torch.cat(losses), torch.cat(hits))
        return logits[0] if keep_logits else None

    def _add_matching_items(self, items, itm_logits, itm_labels):
        if itm_labels is None:
            itm_labels = torch.full_like(itm_logits[:, 0], IGNORED, dtype=torch.long)
        rows = (itm_labels != IGNORED).nonzero().flatten()
        logits, targets = itm_logits[rows].float(), itm_labels[rows]
        losses = F.cross_entropy(logits, targets, reduction="none")
        items.add(rows, OBJECTIVES.index("itm"), losses, logits.argmax(dim=-1) == targets)

    def _add_ablation_items(self, items, regions, class_labels, class_probs, feature_targets, regressed):
        """MRC: cross-entropy; MRC-KL: KL divergence summed over classes; MRFR: squared error, mean over F,
        of the regions where `regressed` (`(B, R)`) is true."""
        nothing = torch.zeros(regions.shape[:2], dtype=torch.bool, device=regions.device)
        if hasattr(self, "region_classifier"):
            picked = nothing if class_labels is None else class_labels != IGNORED
            logits = self.region_classifier(regions[picked]).float()
            targets = class_labels[picked] if class_labels is not None else picked.new_zeros(0, dtype=torch.long)
            losses = F.cross_entropy(logits, targets, reduction="none")
            items.add(picked.nonzero()[:, 0], OBJECTIVES.index("mrc"), losses, logits.argmax(dim=-1) == targets)

            picked = nothing if class_probs is None else class_probs.sum(dim=-1) > 0
            logits = self.region_classifier(regions[picked]).float()
            targets = class_probs[picked].float() if class_probs is not None else torch.zeros_like(logits)
            losses = F.kl_div(logits.log_softmax(dim=-1), targets, reduction="none").sum(dim=-1)
            items.add(picked.nonzero()[:, 0], OBJECTIVES.index("mrc_kl"), losses)
        elif class_labels is not None or class_probs is not None:
            raise ValueError("Region class targets need 'mrc' or 'mrc_kl' in config.objectives.")
        if hasattr(self, "region_regressor"):
            picked = nothing if feature_targets is None or regressed is None else regressed.bool()
            weight = self.uc2.region_embeddings.feature_projection.weight
            predictions = self.region_regressor(regions[picked], weight).float()
            targets = feature_targets[picked].float() if feature_targets is not None else predictions.detach()
            losses = F.mse_loss(predictions, targets, reduction="none").mean(dim=-1)
            items.add(picked.nonzero()[:, 0], OBJECTIVES.index("mrfr"), losses)
        elif feature_targets is not None:
            raise ValueError("region_feature_targets need 'mrfr' in config.objectives.")


def _rows_of(objective: str, region_mask: torch.Tensor | None, objective_ids: torch.Tensor | None):
    """`region_mask` `(B, R)` in the rows of one objective; in all rows if there are no `objective_ids`."""
    if region_mask is None or objective_ids is None:
        return region_mask
    return region_mask.bool() & (objective_ids == OBJECTIVES.index(objective)).unsqueeze(1)


def _token_objectives(token_targets, text_length: int, objective_ids) -> torch.LongTensor:
    """(B, T + R) index in `OBJECTIVES` of what a target at each position belongs to."""
    objectives = torch.full_like(token_targets, OBJECTIVES.index("mrtm"))
    objectives[:, :text_length] = OBJECTIVES.index("mlm")
    if objective_ids is not None:
        for name in TEXT_OBJECTIVES:
            index = OBJECTIVES.index(name)
            objectives[:, :text_length].masked_fill_((objective_ids == index).unsqueeze(1), index)
    return objectives


class _ObjectiveItems:
    """Collects the losses of single targets, each with its example and its objective."""

    def __init__(self, hidden, weights: dict | None, num_items: torch.Tensor | None, with_correct: bool):
        self.batch_size, self.num_items, self.with_correct = len(hidden), num_items, with_correct
        self.weights = torch.tensor([(weights or {}).get(name, 1.0) for name in OBJECTIVES], device=hidden.device)
        self.loss = self.weights.new_zeros(())
        self.rows, self.objectives, self.losses, self.correct = [], [], [], []

    def factors(self, objectives: torch.LongTensor) -> torch.Tensor:
        """(N,) of each target in the loss: its objective's weight / targets of the objective in the update.
        `objectives` are all of this batch's with these objectives."""
        items = self.num_items
        if items is None:
            items = _sum_by(objectives, len(OBJECTIVES), torch.ones_like(objectives))
        return (self.weights / items.to(self.weights.device).clamp(min=1))[objectives]

    def add(self, rows, objective, losses, correct=None, loss=None):
        """rows (N,), objective an index or (N,), losses (N,), correct (N,) or None; loss, the sum of the losses
        times their factors, if there is one already."""
        objectives = objective if torch.is_tensor(objective) else torch.full_like(rows, objective)
        losses = losses.float()
        self.loss = self.loss + ((self.factors(objectives) * losses).sum() if loss is None else loss)
        self.rows.append(rows)
        self.objectives.append(objectives)
        self.losses.append(losses.detach())
        self.correct.append(torch.zeros_like(rows) if correct is None else correct.long())

    def summarise_into(self, result: UC2PreTrainingOutput) -> None:
        rows, objectives = torch.cat(self.rows), torch.cat(self.objectives)
        losses, correct, ones = torch.cat(self.losses), torch.cat(self.correct), torch.ones_like(rows)
        result.loss = self.loss
        result.objective_loss = _sum_by(objectives, len(OBJECTIVES), losses)
        result.objective_items = _sum_by(objectives, len(OBJECTIVES), ones)
        result.example_loss = _sum_by(rows, self.batch_size, losses)
        result.example_items = _sum_by(rows, self.batch_size, ones)
        if self.with_correct:
            result.objective_correct = _sum_by(objectives, len(OBJECTIVES), correct)
            result.example_correct = _sum_by(rows, self.batch_size, correct)


def _sum_by(index: torch.LongTensor, size: int, values: torch.Tensor) -> torch.Tensor:
    """(N,) places, (N,) values -> (size,) sum of the values at each place."""
    return values.new_zeros(size).index_add(0, index, values)


def triplet_loss(logits: torch.Tensor, margin: float = 0.2) -> torch.Tensor:
    """Hinge on sigmoid scores, unreduced (paper A.1): max(0, margin + s(negative) - s(positive)).

    Args:
        logits (`(groups, 1 + negatives)`): raw scores; the first of each group is the true pair.

    Returns `(groups, negatives)`.
    """
    scores = torch.sigmoid(logits.float())
    return (margin + scores[:, 1:] - scores[:, :1]).clamp(min=0)


class UC2ForRetrieval(UC2PreTrainedModel):
    """Image-text score for retrieval (paper section 4): Linear(pooled); its sigmoid is a probability."""

    def __init__(self, config: UC2Config):
        super().__init__(config)
        self.uc2 = UC2Model(config)
        self.score_head = nn.Linear(config.hidden_size, 1)
        self.post_init()

    @classmethod
    def from_pretraining(cls, pretrained_model_name_or_path, **kwargs):
        """A retrieval model whose head starts as the "match" row of the checkpoint's ITM head."""
        source = UC2ForPreTraining.from_pretrained(pretrained_model_name_or_path, **kwargs)
        model = cls(source.config).to(source.dtype)
        model.uc2.load_state_dict(source.uc2.state_dict())
        with torch.no_grad():
            model.score_head.weight.copy_(source.itm_head.weight[1:])
            model.score_head.bias.copy_(source.itm_head.bias[1:])
        return model.eval()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        region_features: torch.Tensor | None = None,
        region_boxes: torch.Tensor | None = None,
        region_attention_mask: torch.Tensor | None = None,
        region_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        group_size: int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SequenceClassifierOutput:
        """
        Model inputs as in `UC2Model`; `logits` are `(B, 1)`. The loss is either
            labels (`(B,)` of 0 and 1): binary cross-entropy, mean over the batch; or
            group_size: the triplet loss over consecutive groups of that many rows, the true pair first.
        """
        outputs = self.uc2(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            region_features=region_features,
            region_boxes=region_boxes,
            region_attention_mask=region_attention_mask,
            region_mask=region_mask,
            inputs_embeds=inputs_embeds,
            read_index=FIRST_TOKEN,
            return_dict=True,
            **kwargs,
        )
        logits = self.score_head(outputs.pooler_output)
        loss = None
        if group_size is not None:
            if group_size < 2 or len(logits) % group_size:
                raise ValueError(f"A batch of {len(logits)} pairs has no groups of {group_size} pairs.")
            loss = triplet_loss(logits.view(-1, group_size), self.config.retrieval_margin).mean()
        elif labels is not None:
            loss = F.binary_cross_entropy_with_logits(logits.float().flatten(), labels.float().flatten())
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class UC2ForVQA(UC2PreTrainedModel):
    """Answer classification (paper section 4.1.2); the classes are `config.id2label`."""

    def __init__(self, config: UC2Config):
        super().__init__(config)
        self.uc2 = UC2Model(config)
        self.classifier = nn.Sequential(
            nn.Linear(config.hidden_size, 2 * config.hidden_size),
            nn.GELU(),
            nn.LayerNorm(2 * config.hidden_size, eps=config.layer_norm_eps),
            nn.Linear(2 * config.hidden_size, config.num_labels),
        )
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        region_features: torch.Tensor | None = None,
        region_boxes: torch.Tensor | None = None,
        region_attention_mask: torch.Tensor | None = None,
        region_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SequenceClassifierOutput:
        """
        Model inputs as in `UC2Model`; `logits` are `(B, answers)`.
            labels (`(B, answers)`): soft targets in [0, 1]; binary cross-entropy, summed over the answers and
                averaged over the batch.
        """
        outputs = self.uc2(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            region_features=region_features,
            region_boxes=region_boxes,
            region_attention_mask=region_attention_mask,
            region_mask=region_mask,
            inputs_embeds=inputs_embeds,
            read_index=FIRST_TOKEN,
            return_dict=True,
            **kwargs,
        )
        logits = self.classifier(outputs.pooler_output)
        loss = None
        if labels is not None:
            if labels.shape != logits.shape:
                raise ValueError(
                    f"labels are {tuple(labels.shape)}; expected (batch, answers) {tuple(logits.shape)}."
                )
            losses = F.binary_cross_entropy_with_logits(logits.float(), labels.float(), reduction="none")
            loss = losses.sum(dim=-1).mean()
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


__all__ = ["UC2ForPreTraining", "UC2ForRetrieval", "UC2ForVQA", "UC2Model", "UC2PreTrainedModel"]
