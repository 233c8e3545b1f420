"""The encoder's layers rearranged for scoring: fewer and larger products, in float32, bfloat16 or int8.

Query, and key and value together, are one product each; on a CPU every product is oneDNN's, with the weight
laid out once and GELU applied before the result leaves the cache. Nothing here is for training.
"""

import warnings
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

PRECISIONS = ("fp32", "bf16", "int8")


class ScoringLayer:
    """One encoder layer. `hidden (B, L, H)` -> `(B, L, H)`, or `(B, 1, H)` for the first token only."""

    def __init__(self, layer, linear: Callable[..., Callable], hidden_act: str, num_heads: int):
        attention = layer.attention
        self.num_heads = num_heads
        self.query = linear([attention.self.query])
        self.key_value = linear([attention.self.key, attention.self.value])
        self.attended = linear([attention.output.dense])
        self.attended_norm = attention.output.LayerNorm
        self.wide = linear([layer.intermediate.dense], gelu=hidden_act == "gelu")
        self.activation = None if hidden_act == "gelu" else ACT2FN[hidden_act]
        self.narrow = linear([layer.output.dense])
        self.output_norm = layer.output.LayerNorm

    def project(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Query (…, H), and key and value side by side (…, 2 H)."""
        return self.query(hidden), self.key_value(hidden)

    def forward(
        self, hidden: Tensor, mask: Tensor | None, *, projected: tuple | None = None, first_only: bool = False
    ) -> Tensor:
        """`mask (B, 1, 1, L)` is True where there is no padding; `projected` is `project(hidden)` if known."""
        asked = hidden[:, :1] if first_only else hidden
        if projected is None:
            query, key_value = self.query(asked), self.key_value(hidden)
        else:
            query, key_value = projected
            query = query[:, :1] if first_only else query
        attended = self.attended(self._attend(query, key_value, mask))
        attended = self.attended_norm(attended + asked)
        wide = self.wide(attended)
        if self.activation is not None:
            wide = self.activation(wide)
        return self.output_norm(self.narrow(wide) + attended)

    def _attend(self, query: Tensor, key_value: Tensor, mask: Tensor | None) -> Tensor:
        """Bidirectional attention of (B, Q, H) over (B, L, 2 H): (B, Q, H)."""
        parts = (query, *key_value.chunk(2, dim=-1))
        query, key, value = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in parts)
        context = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return context.transpose(1, 2).flatten(2)


@torch.no_grad()
def scoring_layers(model, precision: str, rows: int) -> list[ScoringLayer]:
    """The encoder of a model in evaluation mode, for products of about `rows` rows.

    "fp32" computes in the model's own precision, "bf16" has the products and the attention in bfloat16 and
    the rest in the model's precision, "int8" has 8-bit products on a CPU.

    Raises:
        ValueError: int8 on a machine, or a device, without oneDNN's 8-bit products.
    """
    on_cpu = model.device.type == "cpu"
    dtype = torch.bfloat16 if precision == "bf16" else model.dtype
    if precision == "int8" and not (on_cpu and _has_operators("onednn", "qlinear_prepack", "qlinear_pointwise")):
        raise ValueError(
            f"precision int8 needs a CPU and torch built with oneDNN, the model is on {model.device}"
        )
    packs = on_cpu and dtype in (torch.float32, torch.bfloat16)
    packs = packs and _has_operators("mkldnn", "_reorder_linear_weight", "_linear_pointwise")

    def linear(modules: Sequence[nn.Module], gelu: bool = False) -> Callable[[Tensor], Tensor]:
        weights, biases = zip(*map(_affine_map, modules), strict=True)
        weight, bias = torch.cat(weights), torch.cat(biases)
        if precision == "int8":
            return _Int8Linear(weight, bias, gelu, rows)
        kind = _PackedLinear if packs else _PlainLinear
        return kind(weight.to(dtype), bias.to(dtype), gelu, rows)

    config = model.config
    layers = model.uc2.encoder.layer
    return [ScoringLayer(layer, linear, config.hidden_act, config.num_attention_heads) for layer in layers]


def _has_operators(library: str, *names: str) -> bool:
    """These operators are internal to torch, and absent where it is built without oneDNN."""
    return torch.backends.mkldnn.is_available() and all(
        hasattr(getattr(torch.ops, library), name) for name in names
    )


def _affine_map(module: nn.Module) -> tuple[Tensor, Tensor]:
    """(weight (out, in), bias (out,)) of a linear layer, or of one that an adapter such as LoRA wraps."""
    if type(module) is nn.Linear:
        return module.weight, module.bias
    plain = module.weight  # wrappers show the weight that they wrap
    bias = module(plain.new_zeros(1, plain.shape[1]))
    return (module(torch.eye(plain.shape[1], dtype=plain.dtype, device=plain.device)) - bias).T, bias[0]


class _PlainLinear:
    """torch's linear layer, on any device."""

    def __init__(self, weight: Tensor, bias: Tensor, gelu: bool, rows: int):
        self.weight, self.bias, self.gelu = weight, bias, gelu

    def __call__(self, hidden: Tensor) -> Tensor:
        hidden = F.linear(hidden.to(self.weight.dtype), self.weight, self.bias)
        return F.gelu(hidden) if self.gelu else hidden


class _PackedLinear:
    """A linear layer, and GELU if asked for, with its weight laid out once as oneDNN's kernel reads it."""

    def __init__(self, weight: Tensor, bias: Tensor, gelu: bool, rows: int):
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), rows)
        self.bias, self.dtype = bias, weight.dtype
        self.activation = "gelu" if gelu else "none"

    def __call__(self, hidden: Tensor) -> Tensor:
        hidden = hidden.to(self.dtype).contiguous()
        # The last two arguments are options of the activation; "none": the exact GELU, not an approximation.
        return torch.ops.mkldnn._linear_pointwise(hidden, self.weight, self.bias, self.activation, [], "none")


class _Int8Linear:
    """A linear layer with 8-bit weights, scaled per output, and inputs that are quantised on the fly."""

    def __init__(self, weight: Tensor, bias: Tensor, gelu: bool, rows: int):
        weight = weight.float()
        self.scale = weight.abs().amax(dim=1).clamp(min=1e-12) / 127
        quantized = torch.round(weight / self.scale[:, None]).to(torch.int8)
        self.weight = torch.ops.onednn.qlinear_prepack(quantized, [rows, weight.shape[1]])
        self.zero_point = torch.zeros(len(weight), dtype=torch.int32)
        self.bias = bias.float()
        self.activation = "gelu" if gelu else "none"
        # Without VNNI instructions, sums of two products saturate at 16 bits unless inputs have 7.
        self.levels = 255 if torch.cpu._is_vnni_supported() else 127
        with warnings.catch_warnings():  # torch announces, once, that quantised tensors will go
            warnings.simplefilter("ignore", UserWarning)
            self(torch.zeros(1, weight.shape[1]))

    def __call__(self, hidden: Tensor) -> Tensor:
        low, high = (float(end) for end in torch.aminmax(hidden))
        low, high = min(low, 0.0), max(high, 1e-12)
        scale = (high - low) / self.levels
        zero = round(-low / scale)
        quantized = torch.quantize_per_tensor(hidden.float().contiguous(), scale, zero, torch.quint8)
        # The same memory as an ordinary tensor; `int_repr` would copy it.
        integers = torch.empty(0, dtype=torch.uint8).set_(
            quantized.untyped_storage(), 0, quantized.shape, quantized.stride()
        )
        return torch.ops.onednn.qlinear_pointwise(
            integers, scale, zero, self.weight, self.scale, self.zero_point, self.bias,
            1.0, 0, torch.float32, self.activation, [], "none",
        )  # fmt: skip
