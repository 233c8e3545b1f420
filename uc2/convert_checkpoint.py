"""Checkpoints of the original implementation and of VOLTA <-> a folder that `from_pretrained` loads.

    python -m uc2.convert_checkpoint --checkpoint model_step_200000.pt --config uc2-base.json \\
        --head pretraining --output_dir uc2-base
    python -m uc2.convert_checkpoint --to_original --checkpoint uc2-base --head pretraining --output_dir back

Sources, told apart by their names (`roberta.` or `bert.`), are read from .pt, .bin or .safetensors without
running any code stored in them:

- the original's state dict, with the pre-training, retrieval or VQA head. Sizes come from the tensors; what a
  tensor cannot tell (attention heads, dropout, epsilons) from the JSON configuration, the original's or ours;
- VOLTA's `BertForVLPreTraining` (Bugliarello et al., TACL 2021), pre-training only: its fine-tuning pools
  with ReLU where UC2 has tanh. It has no mask vector and no region heads of UC2's: the vector becomes zero,
  the heads are left out. The tensors are taken as they are, and the converter that VOLTA published wrote the
  region LayerNorm over that of the text embeddings: a file made by it does not compute what the original did.

Left out: the unused `vis_cls.*` of the original, the ITM head that its retrieval checkpoint still carries,
and VOLTA's own region heads. All else comes back bit-equal with `--to_original`; row 0 of the original's mask
embedding, that of unmasked regions, is zero there.
"""

import json
import pickle
import re
import sys
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from modeling_uc2 import UC2Config, UC2ForPreTraining, UC2ForRetrieval, UC2ForVQA
from uc2.arguments import parse
from uc2.atomic_files import atomic_directory

HEADS = {"pretraining": UC2ForPreTraining, "retrieval": UC2ForRetrieval, "vqa": UC2ForVQA}
MASK_EMBEDDING = "uc2.region_embeddings.mask_embedding"
# Fields of our configuration that the original's has too.
SHARED_FIELDS = frozenset(
    "vocab_size hidden_size num_hidden_layers num_attention_heads intermediate_size hidden_act"
    " hidden_dropout_prob attention_probs_dropout_prob max_position_embeddings type_vocab_size"
    " initializer_range layer_norm_eps pad_token_id bos_token_id eos_token_id region_feature_size"
    " num_region_classes".split()
)
# Fields that only our configuration has and a conversion keeps.
OWN_FIELDS = frozenset("encoder_layer_norm_eps objective_weights retrieval_margin id2label label2id".split())

# Our name -> the foreign name: the first prefix that fits is replaced. One direction serves both, as
# our names are known from the model.
ORIGINAL_NAMES = (
    ("uc2.embeddings.token_type_embeddings.", "roberta.embeddings.new_token_type_embeddings."),
    ("uc2.region_embeddings.feature_projection.", "roberta.img_embeddings.img_linear."),
    ("uc2.region_embeddings.feature_layer_norm.", "roberta.img_embeddings.img_layer_norm."),
    ("uc2.region_embeddings.location_projection.", "roberta.img_embeddings.pos_linear."),
    ("uc2.region_embeddings.location_layer_norm.", "roberta.img_embeddings.pos_layer_norm."),
    (MASK_EMBEDDING, "roberta.img_embeddings.mask_embedding.weight"),
    ("uc2.region_embeddings.", "roberta.img_embeddings."),
    ("uc2.", "roberta."),
    ("lm_head.decoder.bias", "cls.bias"),
    ("lm_head.", "cls."),
    ("itm_head.", "itm_output."),
    ("region_classifier.dense.", "region_classifier.net.0."),
    ("region_classifier.layer_norm.", "region_classifier.net.2."),
    ("region_classifier.decoder.", "region_classifier.net.3."),
    ("region_regressor.dense.", "feat_regress.net.0."),
    ("region_regressor.layer_norm.", "feat_regress.net.2."),
    ("region_regressor.bias", "feat_regress.bias"),
    ("score_head.", "rank_output."),
    ("classifier.", "vqa_output."),
)
# VOLTA counts attention and feed-forward sub-layers through: layer i is 2i and 2i + 1.
VOLTA_NAMES = (
    (r"uc2.encoder.layer.(\d+).attention.self.", lambda i: f"bert.encoder.layer.{2 * i}.attention_self."),
    (r"uc2.encoder.layer.(\d+).attention.output.", lambda i: f"bert.encoder.layer.{2 * i}.attention_output."),
    (r"uc2.encoder.layer.(\d+).intermediate.", lambda i: f"bert.encoder.layer.{2 * i + 1}.intermediate."),
    (r"uc2.encoder.layer.(\d+).output.", lambda i: f"bert.encoder.layer.{2 * i + 1}.output."),
    ("uc2.embeddings.token_type_embeddings.", "bert.embeddings.new_token_type_embeddings."),
    ("uc2.region_embeddings.feature_projection.", "bert.embeddings.image_embeddings."),
    ("uc2.region_embeddings.feature_layer_norm.", "bert.embeddings.image_layer_norm."),
    ("uc2.region_embeddings.location_projection.", "bert.embeddings.image_location_embeddings."),
    ("uc2.region_embeddings.location_layer_norm.", "bert.embeddings.image_location_layer_norm."),
    (MASK_EMBEDDING, "bert.embeddings.mask_embedding.weight"),
    ("uc2.region_embeddings.LayerNorm.", "bert.embeddings.v_LayerNorm."),
    ("uc2.pooler.", "bert.t_pooler."),
    ("uc2.", "bert."),
    ("lm_head.dense.", "cls.predictions.transform.dense."),
    ("lm_head.layer_norm.", "cls.predictions.transform.LayerNorm."),
    ("lm_head.decoder.bias", "cls.predictions.bias"),
    ("lm_head.", "cls.predictions."),
    ("itm_head.", "cls.bi_seq_relationship."),
)


@dataclass(frozen=True)
class Format:
    """How a foreign state dict names and shares its tensors."""

    names: tuple[tuple[str, str | Callable[[int], str]], ...]
    unused: str  # names, as one pattern, that are known and left out
    optional: frozenset[str]  # foreign names that may be missing
    sublayers_per_layer: int  # encoder modules that are numbered on their own
    copies: tuple[
        tuple[str, str], ...
    ]  # (pattern, replacement): a second name of the tensor named by the result

    def foreign_name(self, ours: str) -> str:
        for pattern, replacement in self.names:
            match = re.match(pattern, ours)
            if match:
                start = replacement if isinstance(replacement, str) else replacement(int(match[1]))
                return start + ours[match.end() :]
        raise KeyError(f"no rule names {ours}")


FORMATS = {
    "roberta.": Format(
        names=ORIGINAL_NAMES,
        unused=r"vis_cls\.|roberta\.embeddings\.position_ids$",
        optional=frozenset(),
        sublayers_per_layer=1,
        copies=(
            (r"^feat_regress\.weight$", "roberta.img_embeddings.img_linear.weight"),
            (r"^cls\.decoder\.bias$", "cls.bias"),
        ),
    ),
    "bert.": Format(
        names=VOLTA_NAMES,
        unused=r"cls\.imagePredictions\.|bert\.embeddings\.position_ids$",
        optional=frozenset({"bert.embeddings.mask_embedding.weight"}),
        sublayers_per_layer=2,
        copies=(
            (
                r"^bert\.embeddings\.image_token_type_embeddings\.",
                "bert.embeddings.new_token_type_embeddings.",
            ),
            (r"^(bert\.encoder\.layer\..*\.)v_(query|key|value|dense|LayerNorm)\.", r"\1\2."),
            (r"^cls\.predictions\.decoder\.bias$", "cls.predictions.bias"),
        ),
    ),
}


class CheckpointError(ValueError):
    """A checkpoint or configuration that cannot be converted; the message names the file and the keys."""


def convert(checkpoint: str | Path, config: str | Path, head: str, output_dir: str | Path) -> None:
    """Write the folder `output_dir`, loadable by `from_pretrained`, whole or not at all.

    Args:
        checkpoint: state dict in .pt, .bin or .safetensors, the original's or VOLTA's.
        config: JSON configuration, the original's, VOLTA's or ours.
        head: "pretraining", "retrieval" or "vqa": the head that the checkpoint carries.

    Raises:
        CheckpointError: names that are unknown, missing, or of no known format; tensors that should be
            equal but differ; a configuration without the number of attention heads.
        FileExistsError: `output_dir` exists and is not empty.
    """
    source = read_state_dict(checkpoint)
    form = _format_of(source, head, checkpoint)
    ours_config = _config_for(source, form, head, config)
    with torch.device("meta"):  # nothing is initialised: every tensor comes from the checkpoint
        model = HEADS[head](ours_config)
    model.load_state_dict(_import(source, form, head, model.state_dict(), checkpoint), assign=True)
    model.tie_weights()
    with atomic_directory(output_dir) as folder:
        model.save_pretrained(folder)


def convert_to_original(folder: str | Path, head: str, output_dir: str | Path) -> None:
    """Write `output_dir/model_step_0.pt` and `output_dir/config.json` as the original's scripts read them.

    Raises:
        CheckpointError: the folder holds a model with another head.
        FileExistsError: `output_dir` exists and is not empty.
    """
    model, loading = HEADS[head].from_pretrained(folder, dtype="auto", output_loading_info=True)
    if loading["missing_keys"] or loading["unexpected_keys"]:
        names = _listed(loading["missing_keys"] | loading["unexpected_keys"])
        raise CheckpointError(f"{folder} does not hold a model with the head {head!r}: see {names}")
    form = FORMATS["roberta."]
    state = {form.foreign_name(name): tensor.contiguous() for name, tensor in model.state_dict().items()}
    masks = form.foreign_name(MASK_EMBEDDING)
    state[masks] = torch.stack([torch.zeros_like(state[masks]), state[masks]])
    if "cls.bias" in state:
        state["cls.decoder.bias"] = state["cls.bias"]
    if "feat_regress.bias" in state:
        state["feat_regress.weight"] = state["roberta.img_embeddings.img_linear.weight"]
    with atomic_directory(output_dir) as target:
        torch.save(state, target / "model_step_0.pt")
        text = json.dumps(_original_config(model.config), indent=1)
        (target / "config.json").write_text(text, encoding="utf-8")


def read_state_dict(path: str | Path) -> dict[str, torch.Tensor]:
    """Tensors by name from a .safetensors file or a `torch.save` file; nothing in it is executed."""
    try:
        if str(path).endswith(".safetensors"):
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path} holds more than tensors and numbers, so it is not read") from error
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise CheckpointError(f"{path} holds no plain state dict, expected a dict of tensors by name")
    return dict(state)


def _format_of(source, head, path) -> Format:
    prefixes = [prefix for prefix in FORMATS if any(name.startswith(prefix) for name in source)]
    if len(prefixes) != 1:
        raise CheckpointError(
            f"{path} has names such as {_listed(source)}; expected the original's (roberta.*)"
            " or VOLTA's (bert.*)"
        )
    if prefixes == ["bert."] and head != "pretraining":
        raise CheckpointError(
            f"{path} is a VOLTA checkpoint: only its pre-training head can be converted, found head {head!r}"
            " (VOLTA fine-tunes with a ReLU pooler, UC2 has tanh)"
        )
    return FORMATS[prefixes[0]]


def _import(source, form: Format, head, targets: dict, path) -> dict[str, torch.Tensor]:
    """The state dict of our model, named and shaped as `targets`, from a foreign one."""
    foreign = {ours: form.foreign_name(ours) for ours in targets}
    _check_names(source, set(foreign.values()), form, head, path)
    state = {ours: source[name] for ours, name in foreign.items() if name in source}
    if MASK_EMBEDDING in state:
        state[MASK_EMBEDDING] = state[MASK_EMBEDDING][1].clone()  # row 1 marks masked regions, row 0 is zero
    else:
        dtype = state["uc2.embeddings.word_embeddings.weight"].dtype
        state[MASK_EMBEDDING] = torch.zeros(targets[MASK_EMBEDDING].shape, dtype=dtype)
    for ours, tensor in state.items():
        if tensor.shape != targets[ours].shape:
            found, expected = tuple(tensor.shape), tuple(targets[ours].shape)
            raise CheckpointError(f"{path}: {foreign[ours]} has shape {found}, expected {expected}")
    for one, other in UC2ForPreTraining._tied_weights_keys.items():
        if one in state and not torch.equal(state[one], state[other]):
            raise CheckpointError(
                f"{path}: {foreign[one]} and {foreign[other]} must be equal, but they differ"
            )
    return state


def _check_names(source, expected: set[str], form: Format, head, path) -> None:
    """Every expected name is there; every other one is known to be unused, or the second name of a tensor."""
    # The original's retrieval model is made from the pre-trained one and still holds its ITM head.
    unused = form.unused + (r"|itm_output\." if head == "retrieval" else "")
    unknown = set()
    for name in source.keys() - expected:
        twin = _twin(name, form)
        if twin in expected and twin in source:
            if not torch.equal(source[name], source[twin]):
                raise CheckpointError(f"{path}: {name} and {twin} must be equal, but they differ")
        elif not re.match(unused, name):
            unknown.add(name)
    found = {"unknown": unknown, "missing": expected - source.keys() - form.optional}
    if any(found.values()):
        listed = "; ".join(f"{label} {_listed(names)}" for label, names in found.items() if names)
        raise CheckpointError(f"{path} does not fit the head {head!r}: {listed}")


def _twin(name: str, form: Format) -> str | None:
    """The name of the tensor of which `name` is a second name, None where it is none."""
    for pattern, replacement in form.copies:
        twin, count = re.subn(pattern, replacement, name)
        if count:
            return twin
    return None


def _config_for(source, form: Format, head, path) -> UC2Config:
    """Sizes from the tensors, the rest from the JSON file, whose fields of other purposes are passed over."""
    given = json.loads(Path(path).read_text(encoding="utf-8"))
    if "num_attention_heads" not in given:
        raise CheckpointError(f"{path} has no num_attention_heads, which the tensors do not tell")
    values = {name: value for name, value in given.items() if name in SHARED_FIELDS | OWN_FIELDS}
    if "inner_layer_norm_eps" in given:
        values["encoder_layer_norm_eps"] = given["inner_layer_norm_eps"]
    sizes = _sizes(source, form, head)
    # Layers that the configuration has beyond the checkpoint's are missing tensors, named with the others.
    sizes["num_hidden_layers"] = max(sizes["num_hidden_layers"], given.get("num_hidden_layers", 0))
    for name in sizes.keys() & values.keys():
        if sizes[name] != values[name]:
            warnings.warn(f"{path}: {name} is {values[name]}, the tensors say {sizes[name]}", stacklevel=3)
    if len(values.get("id2label", ())) == sizes.get("num_labels"):
        del sizes["num_labels"]  # the answers have names
    else:
        values = {name: value for name, value in values.items() if name not in ("id2label", "label2id")}
    return UC2Config(**{**values, **sizes})


def _sizes(source, form: Format, head) -> dict:
    """What the tensors tell of the configuration: widths, counts, and which pre-training heads there are."""

    def size(ours: str, dimension: int) -> int:
        name = form.foreign_name(ours)
        if name not in source:
            raise CheckpointError(f"the checkpoint does not fit the head {head!r}: missing {name}")
        return source[name].shape[dimension]

    layer = "uc2.encoder.layer.0."
    numbers = (re.match(r"\w+\.encoder\.layer\.(\d+)\.", name) for name in source)
    sublayers = 1 + max((int(match[1]) for match in numbers if match), default=-1)
    sizes = {
        "vocab_size": size("uc2.embeddings.word_embeddings.weight", 0),
        "hidden_size": size("uc2.embeddings.word_embeddings.weight", 1),
        "max_position_embeddings": size("uc2.embeddings.position_embeddings.weight", 0),
        "type_vocab_size": size("uc2.embeddings.token_type_embeddings.weight", 0),
        "intermediate_size": size(layer + "intermediate.dense.weight", 0),
        "num_hidden_layers": sublayers // form.sublayers_per_layer,
        "region_feature_size": size("uc2.region_embeddings.feature_projection.weight", 1),
    }
    if head == "vqa":
        sizes["num_labels"] = size("classifier.3.weight", 0)
    objectives = ["mlm", "itm", "mrtm", "vtlm"]
    heads = {name.partition(".")[0] for name in source} if form is FORMATS["roberta."] else set()
    if "region_classifier" in heads:
        sizes["num_region_classes"] = size("region_classifier.decoder.weight", 0)
        objectives += ["mrc", "mrc_kl"]
    if "feat_regress" in heads:
        objectives += ["mrfr"]
    return {**sizes, "objectives": objectives}


def _original_config(config: UC2Config) -> dict:
    """Our configuration in the original's format."""
    values = {name: getattr(config, name) for name in sorted(SHARED_FIELDS)}
    return {**values, "inner_layer_norm_eps": config.encoder_layer_norm_eps}


def _listed(names: Iterable[str], limit: int = 8) -> str:
    names = sorted(names)
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest


@dataclass
class ConversionArguments:
    """Convert a checkpoint of the original or of VOLTA, or go back with --to_original."""

    checkpoint: str = field(metadata={"help": "state dict file; with --to_original a folder to load from"})
    head: str = field(metadata={"help": "the checkpoint's head", "choices": list(HEADS)})
    output_dir: str = field(metadata={"help": "folder to write, new or empty"})
    config: str | None = field(default=None, metadata={"help": "JSON configuration, the original's or ours"})
    to_original: bool = field(default=False, metadata={"help": "write the original's state dict instead"})


def main(argv: list[str] | None = None) -> None:
    (arguments,) = parse([ConversionArguments], sys.argv[1:] if argv is None else argv)
    if arguments.to_original:
        convert_to_original(arguments.checkpoint, arguments.head, arguments.output_dir)
    elif arguments.config is None:
        raise SystemExit("--config is needed: the tensors do not tell the number of attention heads")
    else:
        convert(arguments.checkpoint, arguments.config, arguments.head, arguments.output_dir)
    print(f"wrote {arguments.output_dir}")


if __name__ == "__main__":
    main()
