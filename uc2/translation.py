"""Translates captions and object labels with any transformers seq2seq model, or joins existing translations.

    python prepare_corpus.py translate --input captions.jsonl --output parallel.jsonl \\
        --languages de fr cs ja zh --model facebook/nllb-200-distilled-600M

UC2 translated Conceptual Captions into five languages this way (paper, section 3.1). Killed at any moment and
started again with the same options, it goes on; the result does not change by a byte (given the same number
of threads, by which floating-point sums may differ). Several processes: `--num_processes` on one machine;
`torchrun` or `accelerate launch` on many, with a work directory that all of them see.
"""

import dataclasses
import functools
import json
import logging
import os
import shutil
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from uc2.arguments import parse
from uc2.atomic_files import atomic_file, remove_leftovers, sole_writer, write_json
from uc2.data_error import OptionError
from uc2.file_versions import file_versions
from uc2.object_labels import load_object_labels
from uc2.rows import write_jsonl
from uc2.translation_filters import rejection
from uc2.translation_models import DTYPES, Throughput, Translator
from uc2.translation_sources import CaptionSource
from uc2.translation_work import TranslationReport, TranslationWork

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.5

MANY_LEFT_OUT = 0.2
"""The share of a language's captions from which on a loss is worth a warning."""

# Options that say how the work is done, not what comes out; they may differ between a run and its restart.
_FREE_OPTIONS = ("output", "work_dir", "num_processes", "device", "keep_work_dir")


@dataclass
class TranslationArguments:
    output: str = field(metadata={"help": "Parallel captions (.jsonl) or object labels (.json) to write."})
    input: list[str] = field(
        default_factory=list, metadata={"help": "Captions: JSON Lines, Parquet, Arrow, TSV, text, a Hub id."}
    )
    labels: str | None = field(
        default=None,
        metadata={"help": "Translate these object labels (object_labels.json) instead of captions."},
    )
    languages: list[str] = field(
        default_factory=lambda: ["de", "fr", "cs", "ja", "zh"],
        metadata={"help": "Languages to translate into."},
    )
    source_language: str = field(default="en", metadata={"help": "Language to translate from."})
    model: str | None = field(
        default=None,
        metadata={
            "help": "Seq2seq model; {language} in it is replaced. Without any, --existing ones are joined."
        },
    )
    models: str = field(
        default="{}",
        metadata={"help": 'JSON of models per language, before --model: {"ja": "…/opus-mt-en-jap"}.'},
    )
    language_codes: str = field(
        default="{}", metadata={"help": 'JSON of the model\'s own language codes: {"sr": "srp_Cyrl"}.'}
    )
    prefix: str = field(
        default="",
        metadata={"help": "Text before every source, for models of no known family; may hold {language}."},
    )
    existing: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Translations that exist, LANGUAGE=FILE: text (a caption a line), TSV or JSON Lines."
        },
    )
    image_ids: str | None = field(default=None, metadata={"help": "Image id of each line of text files."})
    image_field: str | None = field(
        default=None, metadata={"help": "Field with the image id; found by itself."}
    )
    caption_field: str | None = field(
        default=None, metadata={"help": "Field with the caption; found by itself."}
    )
    tsv_columns: list[str] = field(
        default_factory=lambda: ["image_id", "caption"],
        metadata={"help": "What the columns of TSV files hold."},
    )
    split: str = field(default="train", metadata={"help": "Split of a saved or Hub data set."})
    dtype: str = field(default="float32", metadata={"help": " | ".join(DTYPES), "choices": list(DTYPES)})
    device: str | None = field(
        default=None, metadata={"help": "cpu or cuda; a GPU per process if there is one."}
    )
    num_beams: int = field(default=4, metadata={"help": "Beams of the search; 1 is greedy and fastest."})
    batch_tokens: int = field(default=4096, metadata={"help": "Source tokens of a batch, padding counted."})
    max_source_tokens: int = field(default=256, metadata={"help": "Longer captions are cut."})
    unit_size: int = field(
        default=2000, metadata={"help": "Sentences finished at a time; what a kill can cost."}
    )
    length_ratio: float = field(
        default=3.0, metadata={"help": "Leave out translations this many times longer or shorter than usual."}
    )
    num_processes: int = field(default=1, metadata={"help": "Processes on this machine."})
    work_dir: str | None = field(default=None, metadata={"help": "Unfinished work; OUTPUT.work if left out."})
    keep_work_dir: bool = field(
        default=False, metadata={"help": "Do not remove the work directory at the end."}
    )

    def __post_init__(self):
        if bool(self.input) == (self.labels is not None):
            raise OptionError("give either --input (captions) or --labels (object labels)")
        if not {"image_id", "caption"} <= set(self.tsv_columns):
            raise OptionError(f"--tsv_columns {self.tsv_columns} must name image_id and caption")
        for option in ("num_beams", "batch_tokens", "max_source_tokens", "unit_size", "num_processes"):
            if getattr(self, option) < 1:
                raise OptionError(f"--{option} is {getattr(self, option)}; expected at least 1")
        if self.length_ratio <= 1:
            raise OptionError(f"--length_ratio is {self.length_ratio}; expected more than 1")
        for pair in self.existing:
            if "=" not in pair:
                raise OptionError(f"--existing {pair}: expected LANGUAGE=FILE, such as de=captions_de.txt")
        for option in ("models", "language_codes"):
            if not isinstance(json.loads(getattr(self, option)), dict):
                raise OptionError(f"--{option} {getattr(self, option)}: expected a JSON object by language")
        joined = {pair.split("=", 1)[0] for pair in self.existing}
        for language in self.languages:
            if self.model_name(language) is None and language not in joined:
                raise OptionError(
                    f"nothing gives '{language}': no --model, --models or --existing {language}=FILE"
                )

    def model_name(self, language: str) -> str | None:
        """The model for a language; None: it is only joined from existing translations."""
        return json.loads(self.models).get(language, self.model)

    def settings(self) -> dict:
        """What decides the result; the sources are told by size and time of change."""
        files = [*self.input, *(pair.split("=", 1)[1] for pair in self.existing)]
        files += [file for file in (self.image_ids, self.labels) if file]
        options = {k: v for k, v in dataclasses.asdict(self).items() if k not in _FREE_OPTIONS}
        return options | {"files": file_versions(files)}


# --- models ---


class Translators:
    """The model of the language at hand, loaded when first asked for; one at a time is held in memory."""

    def __init__(self, args: TranslationArguments, device: str):
        self._args, self._device = args, device
        self._load = functools.lru_cache(maxsize=1)(self._load_model)
        self.throughput: dict[str, Throughput] = {}

    def _load_model(self, language: str) -> Translator:
        args = self._args
        return Translator(
            args.model_name(language),
            args.source_language,
            language,
            language_codes=json.loads(args.language_codes),
            prefix=args.prefix,
            dtype=args.dtype,
            device=self._device,
            num_beams=args.num_beams,
            batch_tokens=args.batch_tokens,
            max_source_tokens=args.max_source_tokens,
        )

    def __call__(self, language: str, texts: list[str]) -> list[dict]:
        """{"translation", "rejected": reason or None} for each text."""
        translator = self._load(language)
        translations = translator(texts)
        self.throughput[language] = translator.throughput
        logger.info("%s-%s: %s", self._args.source_language, language, translator.throughput)
        ratio = self._args.length_ratio
        return [
            {"translation": new, "rejected": rejection(old, new, language, length_ratio=ratio)}
            for old, new in zip(texts, translations, strict=True)
        ]

    def print_summary(self) -> None:
        for language, throughput in self.throughput.items():
            print(f"{self._args.source_language}-{language}: {throughput}")


# --- captions ---


def translate_captions(args: TranslationArguments, rank: int = 0, processes: int = 1) -> None:
    """One process's part: process 0 plans and, when all units are translated, merges."""
    languages = [language for language in args.languages if args.model_name(language)]
    work = TranslationWork(_work_dir(args), args.source_language, languages, args.unit_size)
    if rank == 0 and not work.is_planned:
        logger.info("reading captions and planning the work in %s", work.directory)
        work.plan(_source(args).rows(), _existing(args))
    _wait_until(lambda: work.is_planned or _is_finished(args))
    translators = Translators(args, _device(args))
    work.translate(rank, processes, translators)
    translators.print_summary()
    if rank == 0:
        _wait_until(lambda: work.is_translated)
        _merge(args, work)


def _merge(args: TranslationArguments, work: TranslationWork) -> None:
    """Writes the corpus, its report and what was left out; the corpus last, as the sign that all is done."""
    output = Path(args.output)
    for path in (output, _beside(output, "rejected.jsonl"), _beside(output, "report.json")):
        remove_leftovers(path)
    report = TranslationReport(args.languages)
    merged = write_jsonl(work.merged_rows(report), work.directory / "merged.jsonl")
    write_jsonl(work.rejected(), _beside(output, "rejected.jsonl"))
    write_json({"settings": args.settings()} | report.as_dict(), _beside(output, "report.json"))
    with atomic_file(output) as temporary:
        shutil.copyfile(merged, temporary)
    print(json.dumps(report.as_dict(), indent=2))
    for language, counts in report.languages.items():
        wanted = counts["translated"] + counts["left_out"]
        if counts["left_out"] > MANY_LEFT_OUT * wanted:
            logger.warning(
                "%s: %d of %d captions were left out; is it the right model and language code? See %s",
                language, counts["left_out"], wanted, _beside(output, "rejected.jsonl"),
            )  # fmt: skip


def _beside(output: Path, ending: str) -> Path:
    """captions.jsonl -> captions.report.json"""
    return output.with_name(f"{output.stem}.{ending}")


def _source(args: TranslationArguments) -> CaptionSource:
    return CaptionSource(args.input, args.source_language, **_layout(args))


def _existing(args: TranslationArguments) -> dict[str, CaptionSource]:
    pairs = [pair.split("=", 1) for pair in args.existing]
    return {
        code: CaptionSource(
            [file for language, file in pairs if language == code],
            code,
            beside=_source(args),
            **_layout(args),
        )
        for code in dict.fromkeys(language for language, _ in pairs)
    }


def _layout(args: TranslationArguments) -> dict:
    names = ("image_ids", "image_field", "caption_field", "tsv_columns", "split")
    return {name: getattr(args, name) for name in names}


def _work_dir(args: TranslationArguments) -> Path:
    return Path(args.work_dir or f"{args.output}.work")


def _is_finished(args: TranslationArguments) -> bool:
    return Path(args.output).exists()


def _wait_until(condition) -> None:
    while not condition():
        time.sleep(POLL_SECONDS)


# --- object labels ---


def translate_labels(args: TranslationArguments) -> None:
    """Adds languages to object labels. For a rejected name the source language's is kept, and reported."""
    labels = load_object_labels(args.labels)
    names = labels[args.source_language]
    translators, fallbacks = Translators(args, _device(args)), {}
    for language in args.languages:
        if language not in labels:
            unique = list(dict.fromkeys(names))
            found = dict(zip(unique, translators(language, unique), strict=True))
            fallbacks[language] = {name: result for name, result in found.items() if result["rejected"]}
            labels[language] = [
                name if name in fallbacks[language] else found[name]["translation"] for name in names
            ]
    translators.print_summary()
    for path in (Path(args.output), _beside(Path(args.output), "report.json")):
        remove_leftovers(path)
    write_json(
        {"settings": args.settings(), "fallbacks": fallbacks}, _beside(Path(args.output), "report.json")
    )
    write_json(labels, args.output)
    for language, rejected in fallbacks.items():
        print(f"{language}: {len(names)} labels, {len(rejected)} kept in '{args.source_language}'")


# --- processes ---


def _device(args: TranslationArguments) -> str:
    if args.device:
        return args.device
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"


def _local_process(rank: int, args: TranslationArguments) -> None:
    logging.basicConfig(level=logging.INFO)
    os.environ["LOCAL_RANK"] = str(rank % max(torch.cuda.device_count(), 1))
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // args.num_processes))
    translate_captions(args, rank, args.num_processes)


def _check_settings(args: TranslationArguments) -> bool:
    """Whether the output is there already.

    Raises:
        OptionError: the work directory or the output comes from other options or other input files.
    """
    settings = args.settings()
    report, record = _beside(Path(args.output), "report.json"), _work_dir(args) / "settings.json"
    finished = _is_finished(args)
    for path, found in ((report, finished), (record, record.exists() and not finished)):
        before = _settings_of(path) if found else settings
        changed = [name for name in settings.keys() | before.keys() if settings.get(name) != before.get(name)]
        if changed:
            names = ", ".join(sorted(changed))
            raise OptionError(f"{path} is of a run with other options ({names}); remove it or write elsewhere")
    return finished


def _settings_of(path: Path) -> dict:
    if not path.exists():
        raise OptionError(f"the output exists, but not {path}, which says how it was made; write elsewhere")
    found = json.loads(path.read_text(encoding="utf-8"))
    return found.get("settings", found)


def main(argv: list[str] | None = None) -> None:
    (args,) = parse((TranslationArguments,), sys.argv[1:] if argv is None else argv)
    logging.basicConfig(level=logging.INFO)
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if rank == 0:
        with sole_writer(args.output):
            _lead(args, processes)
    elif args.labels is None and not _check_settings(args):
        translate_captions(args, rank, processes)


def _lead(args: TranslationArguments, processes: int) -> None:
    """What process 0 does, on its own or with the others."""
    if _check_settings(args):
        print(f"{args.output} is finished already.")
    elif args.labels is not None:
        translate_labels(args)
    else:
        write_json(args.settings(), _work_dir(args) / "settings.json")
        if processes == 1 and args.num_processes > 1:
            torch.multiprocessing.spawn(_local_process, (args,), nprocs=args.num_processes)
        else:
            translate_captions(args, 0, processes)
    if _work_dir(args).exists() and not args.keep_work_dir:
        shutil.rmtree(_work_dir(args))


if __name__ == "__main__":
    main()
