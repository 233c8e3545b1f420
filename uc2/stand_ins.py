"""Stand-ins for every checkpoint that preparing a corpus takes, for a trial without any download.

    python -m uc2.stand_ins --captions captions.jsonl --output_dir stand-ins

From parallel captions it makes, each in a folder of its own: `detector` and `backbone` with random weights,
`text_encoder` (a small XLM-R and its tokenizer), and `translator`, a Marian model for several languages that has
learnt these very captions by heart and knows nothing else. None is good for anything but trying the commands.
"""

import argparse
import json
import logging
from collections.abc import Sequence
from pathlib import Path

import sentencepiece
import timm
import torch
from timm.models import save_for_hf
from tqdm import tqdm
from transformers import MarianConfig, MarianMTModel, MarianTokenizer

from modeling_uc2 import UC2RegionDetector, UC2RegionDetectorConfig
from processing_uc2 import UC2DetectorImageProcessor
from uc2.demo_text_encoder import save_demo_text_encoder
from uc2.demo_tokenizer import train_tokenizer
from uc2.rows import load_parallel_captions
from uc2.translation_models import MARIAN_CODES

logger = logging.getLogger(__name__)

SOURCE = "en"
SENTENCES_AT_ONCE = 64
TRANSLATOR_LAYERS = {"layers": 1, "attention_heads": 4, "ffn_dim": 256}


def save_detector(folder: Path, num_classes: int) -> None:
    """A Faster R-CNN with one block per stage, for images of 240 pixels."""
    torch.manual_seed(0)
    sizes = {"depths": [1, 1, 1, 1], "widths": [8, 8, 16, 16], "num_classes": num_classes}
    UC2RegionDetector(UC2RegionDetectorConfig(**sizes, proposals_after_nms=50)).save_pretrained(folder)
    UC2DetectorImageProcessor(size={"shortest_edge": 240, "longest_edge": 400}).save_pretrained(folder)


def save_backbone(folder: Path) -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_resnet.r160_in1k", num_classes=0)
    save_for_hf(model, str(folder), safe_serialization=True)


def save_text_encoder(folder: Path, captions: Sequence[dict[str, str]]) -> None:
    texts = [text for row in captions for text in row.values()]
    save_demo_text_encoder(folder, train_tokenizer(texts, vocab_size=600), captions)


def save_translator(folder: Path, captions: Sequence[dict[str, str]], steps: int = 200) -> float:
    """Trains the translator until it knows the captions; gives the last loss."""
    tokenizer = _translation_tokenizer(folder, captions)
    pairs = [
        (f">>{MARIAN_CODES.get(language, language)}<< {row[SOURCE]}", text)
        for row in captions
        for language, text in row.items()
        if language != SOURCE
    ]
    torch.manual_seed(0)
    special = {"pad_token_id": tokenizer.pad_token_id, "decoder_start_token_id": tokenizer.pad_token_id}
    special |= {"eos_token_id": tokenizer.eos_token_id, "forced_eos_token_id": tokenizer.eos_token_id}
    layers = {f"{part}_{name}": n for part in ("encoder", "decoder") for name, n in TRANSLATOR_LAYERS.items()}
    starts = {"init_std": 0.1, "scale_embedding": True}  # otherwise positions drown the words, and it learns slowly
    config = MarianConfig(vocab_size=len(tokenizer), d_model=64, dropout=0.0, **starts, **special, **layers)
    model = MarianMTModel(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for step in tqdm(range(steps), desc="translator", unit="step"):
        start = step * SENTENCES_AT_ONCE % len(pairs)
        sources, targets = zip(*(pairs + pairs)[start : start + min(SENTENCES_AT_ONCE, len(pairs))], strict=True)
        batch = tokenizer(list(sources), text_target=list(targets), padding=True, return_tensors="pt")
        batch["labels"][batch["labels"] == tokenizer.pad_token_id] = -100
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval().save_pretrained(folder)
    return loss.item()


def _translation_tokenizer(folder: Path, captions: Sequence[dict[str, str]]) -> MarianTokenizer:
    """A Marian tokenizer of pieces that the captions have, with a token per target language."""
    folder.mkdir(parents=True, exist_ok=True)
    spm = folder / "pieces.spm"
    texts = [text for row in captions for text in row.values()]
    options = {"vocab_size": 600, "hard_vocab_limit": False, "character_coverage": 1.0, "minloglevel": 2}
    with open(spm, "wb") as stream:
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(texts), model_writer=stream, **options)
    model = sentencepiece.SentencePieceProcessor(model_file=str(spm))
    pieces = [model.id_to_piece(i) for i in range(len(model))][3:]  # without <unk>, <s>, </s>
    languages = sorted({language for row in captions for language in row} - {SOURCE})
    targets = [f">>{MARIAN_CODES.get(language, language)}<<" for language in languages]
    vocabulary = ["</s>", "<unk>", *targets, *pieces, "<pad>"]
    file = folder / "vocab.json"
    file.write_text(json.dumps({piece: i for i, piece in enumerate(vocabulary)}), encoding="utf-8")
    tokenizer = MarianTokenizer(str(spm), str(spm), str(file))
    tokenizer.save_pretrained(folder)
    spm.unlink()
    return tokenizer


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m uc2.stand_ins", description=__doc__.splitlines()[0])
    parser.add_argument("--captions", nargs="+", required=True, help="parallel captions, a few dozen rows")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--num_classes", type=int, default=1600, help="object classes of the detector")
    args = parser.parse_args(argv)
    rows = load_parallel_captions(args.captions)["captions"]
    captions = [{language: text for language, text in row.items() if text} for row in rows]
    save_detector(args.output_dir / "detector", args.num_classes)
    save_backbone(args.output_dir / "backbone")
    save_text_encoder(args.output_dir / "text_encoder", captions)
    loss = save_translator(args.output_dir / "translator", captions)
    print(f"{args.output_dir}: detector, backbone, text_encoder, translator (loss {loss:.3f})")


if __name__ == "__main__":
    main()
