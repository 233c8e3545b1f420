"""A fine-tuned or pre-trained UC2 as an ONNX file, for use without PyTorch.

    python -m uc2.onnx_export --model runs/retrieval --output retrieval.onnx
    python -m uc2.onnx_export --model runs/vqa --output vqa-int8.onnx --precision int8

Inputs are what `UC2Processor` gives, `input_ids` and `attention_mask` (B, T), `region_features` (B, R, F),
`region_boxes` (B, R, 4) and `region_attention_mask` (B, R), all of any B, T and R; R = 0 is text alone, T = 0 regions
alone. Positions are counted from `input_ids`, so the two captions of VTLM are not for this file. Outputs:

| model | outputs |
|---|---|
| UC2ForRetrieval | `logits` (B, 1); the sigmoid is the probability |
| UC2ForVQA | `logits` (B, answers), in the order of `config.id2label` |
| UC2ForPreTraining | `itm_logits` (B, 2), index 1 is "match"; `prediction_logits` (B, T + R, V) |

The file's results are compared with PyTorch's before the command ends.
"""

import sys
import tempfile
import warnings
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig

from modeling_uc2 import UC2ForPreTraining, UC2ForRetrieval, UC2ForVQA
from uc2.arguments import parse
from uc2.data_error import DataError, Found
from uc2.script_errors import told_in_one_sentence

OUTPUTS = {
    UC2ForPreTraining: ("itm_logits", "prediction_logits"),
    UC2ForRetrieval: ("logits",),
    UC2ForVQA: ("logits",),
}
AXES = {
    "input_ids": {0: "batch", 1: "tokens"},
    "attention_mask": {0: "batch", 1: "tokens"},
    "region_features": {0: "batch", 1: "regions"},
    "region_boxes": {0: "batch", 1: "regions"},
    "region_attention_mask": {0: "batch", 1: "regions"},
}
# (B, T, R) to compare on: one pair, ragged batches, a long text, text alone, regions alone.
CHECKED_SHAPES = ((1, 1, 1), (3, 8, 36), (5, 20, 10), (2, 60, 100), (2, 6, 0), (2, 0, 6))
ATOL, RTOL = 1e-4, 1e-5
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
# A file holds at most 2 GiB; larger models get their weights in a second file, named <file>.data.
ONE_FILE_BYTES = 1_900_000_000


class _Plain(nn.Module):
    """A head with exactly the inputs and outputs of the file."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask, region_features, region_boxes, region_attention_mask):
        values = (input_ids, attention_mask, region_features, region_boxes, region_attention_mask)
        outputs = self.model(**dict(zip(AXES, values, strict=True)))
        return tuple(outputs[name] for name in OUTPUTS[type(self.model)])


def random_inputs(config, batch: int, tokens: int, regions: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """A batch whose rows have ever fewer real tokens and regions, at least one of those there are."""
    rng = torch.Generator().manual_seed(seed)
    rows = torch.arange(batch)[:, None]
    real = torch.arange(tokens) < (tokens - rows).clamp(min=1)
    ids = torch.randint(4, config.vocab_size, (batch, tokens), generator=rng)
    corners = torch.rand(batch, regions, 2, 2, generator=rng).sort(dim=2).values
    return {
        "input_ids": ids.masked_fill(~real, config.pad_token_id),
        "attention_mask": real.long(),
        "region_features": torch.randn(batch, regions, config.region_feature_size, generator=rng),
        "region_boxes": corners.flatten(2),
        "region_attention_mask": (torch.arange(regions) < (regions - rows).clamp(min=1)).long(),
    }


def export_onnx(model, path: str | Path) -> None:
    """Writes a model's graph and weights, in float32.

    Args:
        model: UC2ForRetrieval, UC2ForVQA or UC2ForPreTraining; its mode and weights are left as they are.

    Raises:
        DataError: another model.
    """
    if type(model) not in OUTPUTS:
        expected = f"one of {', '.join(kind.__name__ for kind in OUTPUTS)}"
        raise DataError(field="architectures", found=type(model).__name__, expected=expected)
    was_training = model.training
    sample = random_inputs(model.config, 2, 5, 3)
    with warnings.catch_warnings():
        # The exporter tells of names it unites and of transformers' bookkeeping: nothing that concerns the graph.
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            _Plain(model).eval(),
            tuple(sample.values()),
            input_names=list(AXES),
            output_names=list(OUTPUTS[type(model)]),
            dynamic_shapes=AXES,
            dynamo=True,
            verbose=False,
        )
    model.train(was_training)
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # the exporter's stack traces, with the paths of this machine
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    program.save(path, external_data=size > ONE_FILE_BYTES)


def quantize_onnx(source: str | Path, target: str | Path) -> None:
    """Writes a copy with 8-bit weights, embeddings included; activations are quantised as they come."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(source, target, per_channel=True, weight_type=QuantType.QInt8)


def onnx_session(path: str | Path, threads: int = 0):
    """An onnxruntime session on the CPU; 0 threads: as many as there are cores."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def run_onnx(session, inputs: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """The outputs by name; `inputs` as `UC2Processor` gives them (further ones are left out)."""
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {name: inputs[name].numpy() for name in AXES}), strict=True))


@torch.no_grad()
def largest_difference(model, path: str | Path, *, check: bool = True) -> float:
    """How far the file's outputs are from PyTorch's, over batches of several shapes, absolute.

    Raises:
        ValueError: with `check`, if an output differs by more than `ATOL` + `RTOL` times PyTorch's.
    """
    session, was_training = onnx_session(path), model.training
    model.eval()
    worst = 0.0
    for shape in CHECKED_SHAPES:
        inputs = random_inputs(model.config, *shape)
        expected = model(**_present(inputs))
        for name, found in run_onnx(session, inputs).items():
            target = expected[name].numpy()
            if check and not np.allclose(found, target, atol=ATOL, rtol=RTOL):
                difference = np.abs(found - target).max()
                raise ValueError(f"{path}: {name} of a batch of (B, T, R) = {shape} is {difference:.2e} off PyTorch's")
            worst = max(worst, float(np.abs(found - target).max()))
    model.train(was_training)
    return worst


def _present(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Without the inputs of no token or no region, which PyTorch is not given."""
    return {name: value for name, value in inputs.items() if value.shape[1]}


def load_head(name_or_path: str):
    """A UC2 with a head, in float32 and evaluation mode."""
    config = AutoConfig.from_pretrained(name_or_path)
    architecture = (config.architectures or [config.model_type])[0]
    heads = {kind.__name__: kind for kind in OUTPUTS}
    if architecture not in heads:
        raise DataError(
            file=name_or_path, field="architectures", found=architecture, expected=f"one of {', '.join(heads)}"
        )
    return heads[architecture].from_pretrained(name_or_path, dtype=torch.float32).eval()


@dataclass
class ExportArguments:
    """Write a UC2 with a head as an ONNX file."""

    model: str = field(metadata={"help": "folder or Hub id of a UC2ForRetrieval, UC2ForVQA or UC2ForPreTraining"})
    output: str = field(metadata={"help": "the .onnx file to write"})
    precision: str = field(
        default="fp32",
        metadata={"help": "fp32, equal to PyTorch; or int8, a quarter of the size", "choices": ["fp32", "int8"]},
    )


def main(argv: list[str] | None = None) -> float:
    """Export and check. Returns the largest difference from PyTorch."""
    (arguments,) = parse([ExportArguments], sys.argv[1:] if argv is None else argv)
    with told_in_one_sentence():
        missing = [name for name in PACKAGES if find_spec(name) is None]
        if missing:
            raise DataError(found=Found(f"no package {missing[0]}"), expected=f"pip install {' '.join(PACKAGES)}")
        model = load_head(arguments.model)
        output = Path(arguments.output)
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=output.parent) as folder:
            file = Path(folder, output.name)
            export_onnx(model, file)
            difference = largest_difference(model, file)
            if arguments.precision == "int8":
                exact = file.rename(file.with_suffix(".fp32.onnx"))
                quantize_onnx(exact, file)
                exact.unlink()
                difference = largest_difference(model, file, check=False)
            for part in Path(folder).iterdir():  # the weights of a large model are a file of their own
                part.replace(output.parent / part.name)
    megabytes = sum(part.stat().st_size for part in output.parent.glob(f"{output.name}*")) / 1e6
    print(f"wrote {output}: {megabytes:,.1f} MB, at most {difference:.1e} off PyTorch")
    return difference


if __name__ == "__main__":
    main()
