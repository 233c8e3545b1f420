"""Translation of captions and labels, with tiny random models and tokenizers trained here."""

import contextlib
import io
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import sentencepiece
import torch
from transformers import (
    M2M100Config,
    M2M100ForConditionalGeneration,
    M2M100Tokenizer,
    MarianConfig,
    MarianMTModel,
    MarianTokenizer,
    NllbTokenizer,
    T5Config,
    T5ForConditionalGeneration,
    T5Tokenizer,
)

from uc2 import translation
from uc2.arguments import parse
from uc2.data_error import DataError
from uc2.rows import load_parallel_captions
from uc2.translation_filters import has_script, rejection
from uc2.translation_models import Translator, length_batches, model_family
from uc2.translation_sources import CaptionSource

REPOSITORY = Path(__file__).resolve().parents[1]
NOUNS = (
    "dog cat man woman child boy girl horse bird car bus tree house boat ball bike table chair cup plate"
).split()
VERBS = "sees holds follows likes carries watches paints moves finds passes".split()
CAPTIONS = [f"A {a} {v} the {b}." for a in NOUNS[:10] for v in VERBS for b in NOUNS[10:]]
SIZES = dict(
    d_model=16,
    encoder_layers=1,
    decoder_layers=1,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
    encoder_ffn_dim=32,
    decoder_ffn_dim=32,
    max_position_embeddings=128,
    init_std=0.5,
)


@pytest.fixture(autouse=True)
def one_thread():
    """Sums, and so the last bits of scores, may depend on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def spm_file(tmp_path_factory) -> Path:
    """A SentencePiece model of at most 120 pieces trained on the captions."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CAPTIONS),
        model_writer=model,
        vocab_size=120,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    path = tmp_path_factory.mktemp("spm") / "source.spm"
    path.write_bytes(model.getvalue())
    return path


def pieces(spm_file: Path) -> list[str]:
    model = sentencepiece.SentencePieceProcessor(model_file=str(spm_file))
    return [model.id_to_piece(i) for i in range(model.get_piece_size())][3:]


def save_vocabulary(tokens: list[str], path: Path) -> Path:
    path.write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    return path


@pytest.fixture(scope="session")
def marian(spm_file, tmp_path_factory) -> Path:
    """A random one-pair Marian model, whose vocabulary has no language tokens."""
    folder = tmp_path_factory.mktemp("marian")
    return _save_marian(folder, ["</s>", "<unk>", *pieces(spm_file), "<pad>"], spm_file)


@pytest.fixture(scope="session")
def multi_target_marian(spm_file, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("multi")
    tokens = ["</s>", "<unk>", ">>deu<<", ">>fra<<", *pieces(spm_file), "<pad>"]
    return _save_marian(folder, tokens, spm_file)


def _save_marian(folder: Path, tokens: list[str], spm_file: Path) -> Path:
    vocabulary = save_vocabulary(tokens, folder / "vocab.json")
    MarianTokenizer(str(spm_file), str(spm_file), str(vocabulary)).save_pretrained(folder)
    torch.manual_seed(0)
    pad = len(tokens) - 1
    ids = dict(pad_token_id=pad, eos_token_id=0, forced_eos_token_id=0, decoder_start_token_id=pad)
    MarianMTModel(MarianConfig(vocab_size=len(tokens), **ids, **SIZES)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def m2m100(spm_file, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("m2m100")
    vocabulary = save_vocabulary(["<s>", "<pad>", "</s>", "<unk>", *pieces(spm_file)], folder / "vocab.json")
    tokenizer = M2M100Tokenizer(str(vocabulary), str(spm_file))
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    model = M2M100ForConditionalGeneration(M2M100Config(vocab_size=256, **SIZES))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def nllb(spm_file, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("nllb")
    vocabulary = {t: i for i, t in enumerate(["<s>", "<pad>", "</s>", "<unk>", "▁", *"abcdefgh"])}
    tokenizer = NllbTokenizer(vocab=vocabulary, merges=[])
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    M2M100ForConditionalGeneration(M2M100Config(vocab_size=len(tokenizer), **SIZES)).save_pretrained(folder)
    return folder


def write_rows(path: Path, rows) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def read_rows(path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def captions_file(tmp_path) -> str:
    """60 rows with 40 distinct English captions; row 0 has a German one already."""
    rows = [{"image_id": f"i{n}", "captions": {"en": CAPTIONS[n % 40]}} for n in range(60)]
    rows[0]["captions"]["de"] = "Ein Hund sieht den Baum."
    rows[0]["alignment"] = {"de": "0-0 1-1"}
    return write_rows(tmp_path / "captions.jsonl", rows)


# --- filters ---


@pytest.mark.parametrize(
    ("source", "new", "language", "expected"),
    [
        ("A dog runs on the beach.", "Ein Hund läuft am Strand.", "de", None),
        ("A dog runs on the beach.", "犬が浜辺を走っています。", "ja", None),
        ("A dog runs on the beach.", "一只狗在海滩上奔跑。", "zh", None),
        ("taxi", "Taxi", "de", None),
        ("A dog runs on the beach.", "", "de", "empty"),
        ("A dog runs on the beach.", "...", "ja", "empty"),
        ("A dog runs on the beach.", "A dog is on a beach.", "ja", "script"),
        ("A dog runs on the beach.", "犬が浜辺を走っています。", "zh", "script"),
        ("A dog runs on the beach.", "Собака на пляже", "cs", "script"),
        ("A dog runs on the beach.", "A dog runs on the beach", "fr", "copied_source"),
        ("A dog runs on the beach.", "Ein ein ein ein ein ein Hund", "de", "repetition"),
        ("A dog runs on the beach with a ball and a bone.", "Hund", "de", "length_ratio"),
        ("A dog.", "Ein Hund, der gerade am Strand entlang läuft und bellt.", "de", "length_ratio"),
    ],
)
def test_rejection(source, new, language, expected):
    assert rejection(source, new, language) == expected


def test_scripts_accept_the_real_labels_of_each_language():
    words = {"de": "Straßenlöwe", "fr": "cœur", "cs": "žluťoučký kůň", "ja": "ホテル", "zh": "马"}
    assert all(has_script(word, language) for language, word in words.items())
    assert not has_script("horse", "zh")


def test_length_batches_are_full_but_never_over_the_budget():
    lengths = [3, 9, 4, 4, 20, 1]
    batches = list(length_batches(lengths, 10))
    assert sorted(i for batch in batches for i in batch) == list(range(6))
    assert batches == [[4], [1], [2, 3], [0, 5]]


# --- models ---


def test_model_families():
    assert model_family("m2m_100", {"eng_Latn"}.__contains__) == "nllb"
    assert model_family("m2m_100", {"__en__"}.__contains__) == "m2m100"
    assert model_family("t5", {"<2en>"}.__contains__) == "madlad"
    assert model_family("t5", set().__contains__) == "other"


def test_batched_translation_equals_one_generate_call_per_text(marian):
    translator = Translator(str(marian), "en", "de", num_beams=1, batch_tokens=4096)
    texts = ["A dog sees the tree.", "A cat.", "A woman follows the boat and a bird."]
    tokenizer = MarianTokenizer.from_pretrained(marian)
    model = MarianMTModel.from_pretrained(marian).eval()
    for text, found in zip(texts, translator(texts), strict=True):
        inputs = tokenizer(text, return_tensors="pt")
        output = model.generate(**inputs, num_beams=1, max_length=2 * inputs["input_ids"].shape[1] + 10)
        # A batch stops at its longest text; alone, a text may be cut earlier.
        assert found.startswith(tokenizer.decode(output[0], skip_special_tokens=True).strip())
    assert translator.throughput.texts == 3 and translator.throughput.tokens > 0


def test_m2m100_is_told_both_languages(m2m100):
    translator = Translator(str(m2m100), "en", "cs", num_beams=1)
    tokenizer = M2M100Tokenizer.from_pretrained(m2m100, src_lang="en")
    model = M2M100ForConditionalGeneration.from_pretrained(m2m100).eval()
    inputs = tokenizer("A dog sees the tree.", return_tensors="pt")
    assert inputs["input_ids"][0, 0] == tokenizer.get_lang_id("en")
    limit = 2 * inputs["input_ids"].shape[1] + 10
    first = tokenizer.get_lang_id("cs")
    output = model.generate(**inputs, forced_bos_token_id=first, num_beams=1, max_length=limit)
    expected = tokenizer.decode(output[0], skip_special_tokens=True).strip()
    assert translator(["A dog sees the tree."]) == [expected]
    assert output[0, 1] == first


def test_nllb_codes_are_mapped(nllb):
    translator = Translator(str(nllb), "en", "zh", num_beams=1)
    assert translator._search["forced_bos_token_id"] == translator.tokenizer.convert_tokens_to_ids("zho_Hans")
    assert translator.tokenizer.src_lang == "eng_Latn"
    other = Translator(str(nllb), "en", "zh", num_beams=1, language_codes={"zh": "zho_Hant"})
    assert other._search["forced_bos_token_id"] == other.tokenizer.convert_tokens_to_ids("zho_Hant")


def test_multi_target_marian_gets_a_prefix_token(multi_target_marian, marian):
    assert Translator(str(multi_target_marian), "en", "de")._prefix == ">>deu<< "
    assert Translator(str(marian), "en", "de")._prefix == ""


@pytest.fixture(scope="session")
def t5(tmp_path_factory) -> Path:
    """A T5 whose vocabulary has MADLAD's language tokens."""
    folder = tmp_path_factory.mktemp("t5")
    tokens = ["<pad>", "</s>", "<unk>", "<2en>", "<2de>", "▁", *"abcdefghijklmnop"]
    tokenizer = T5Tokenizer(vocab=[(token, -float(i)) for i, token in enumerate(tokens)], extra_ids=0)
    tokenizer.add_tokens(["<2en>", "<2de>"], special_tokens=True)
    tokenizer.save_pretrained(folder)
    sizes = dict(d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, vocab_size=len(tokenizer))
    T5ForConditionalGeneration(T5Config(decoder_start_token_id=0, **sizes)).save_pretrained(folder)
    return folder


def test_madlad_and_plain_t5_get_a_prefix(t5):
    madlad = Translator(str(t5), "en", "de")
    assert madlad._prefix == "<2de> "
    ids = madlad.tokenizer(madlad._prefix + "abc")["input_ids"]
    assert ids[0] == madlad.tokenizer.convert_tokens_to_ids("<2de>")
    plain = Translator(str(t5), "en", "de", prefix="translate to {language}: ", num_beams=1)
    assert plain._prefix == "translate to de: " and len(plain(["abc", "bad"])) == 2


def test_unknown_language_is_an_error(m2m100, multi_target_marian):
    with pytest.raises(ValueError, match="no token '__xx__' for the language 'xx'"):
        Translator(str(m2m100), "en", "xx")
    with pytest.raises(ValueError, match=r"no token .* Known: >>deu<<, >>fra<<"):
        Translator(str(multi_target_marian), "en", "ja")


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_reduced_precision_runs(marian, dtype):
    translations = Translator(str(marian), "en", "de", dtype=dtype, num_beams=1)(CAPTIONS[:4])
    assert len(translations) == 4 and all(isinstance(text, str) for text in translations)


# --- the command ---


class Dictionary:
    """Stands for a model: translates word by word in a way that tests can undo."""

    calls: list[list[str]] = []

    def __init__(self, name, source, target, **options):
        from uc2.translation_models import Throughput

        self.target, self.throughput = target, Throughput()

    def __call__(self, texts):
        self.calls.append(list(texts))
        return [f"{self.target.upper()} {text[::-1]}" for text in texts]


@pytest.fixture
def dictionary(monkeypatch):
    monkeypatch.setattr(translation, "Translator", Dictionary)
    Dictionary.calls = []
    return Dictionary


def run(*arguments) -> None:
    translation.main([str(argument) for argument in arguments])


def test_every_distinct_caption_is_translated_once_and_existing_ones_stay(
    dictionary, captions_file, tmp_path
):
    out = tmp_path / "out.jsonl"
    run(
        "--input",
        captions_file,
        "--output",
        out,
        "--languages",
        "de",
        "fr",
        "--model",
        "m",
        "--unit_size",
        15,
    )
    rows = read_rows(out)
    assert [row["image_id"] for row in rows] == [f"i{n}" for n in range(60)]
    assert rows[0]["captions"]["de"] == "Ein Hund sieht den Baum." and rows[0]["alignment"] == {
        "de": "0-0 1-1"
    }
    for n, row in enumerate(rows[1:], 1):
        expected = {"de": f"DE {CAPTIONS[n % 40][::-1]}", "fr": f"FR {CAPTIONS[n % 40][::-1]}"}
        assert row["captions"] == {"en": CAPTIONS[n % 40]} | expected and "alignment" not in row
    german = [text for call in dictionary.calls[:3] for text in call]
    # Caption 0 comes again in row 40, which has no German.
    assert sorted(german) == sorted(set(CAPTIONS[:40]))
    report = json.loads((tmp_path / "out.report.json").read_text())
    assert report["rows"] == 60
    counts = {"present": 1, "translated": 59, "left_out": 0, "sentences": 40, "rejected": {}}
    assert report["languages"]["de"] == counts
    assert not (tmp_path / "out.jsonl.work").exists()
    assert len(load_parallel_captions(str(out))) == 60


def test_rejected_translations_are_left_out_and_listed(monkeypatch, captions_file, tmp_path, caplog):
    class Copies(Dictionary):
        def __call__(self, texts):
            return [text if "dog" in text else f"Ein {text}" for text in texts]

    monkeypatch.setattr(translation, "Translator", Copies)
    run("--input", captions_file, "--output", tmp_path / "out.jsonl", "--languages", "de", "--model", "m")
    rows = read_rows(tmp_path / "out.jsonl")
    copied = {caption for caption in CAPTIONS[:40] if "dog" in caption}
    assert all(("de" in row["captions"]) == (row["captions"]["en"] not in copied) for row in rows[1:])
    rejected = read_rows(tmp_path / "out.rejected.jsonl")
    assert {row["text"] for row in rejected} == copied
    assert {row["rejected"] for row in rejected} == {"copied_source"}
    report = json.loads((tmp_path / "out.report.json").read_text())["languages"]["de"]
    assert report["rejected"] == {"copied_source": len(copied)}
    left_out = sum(row["captions"]["en"] in copied for row in rows[1:])
    assert report["left_out"] == left_out
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warning.startswith(f"de: {left_out} of 59 captions were left out") and "out.rejected.jsonl" in warning


def test_finished_work_is_not_done_again_and_other_options_are_refused(dictionary, captions_file, tmp_path):
    arguments = [
        "--input",
        captions_file,
        "--output",
        tmp_path / "out.jsonl",
        "--languages",
        "de",
        "--model",
        "m",
    ]
    run(*arguments)
    calls = len(dictionary.calls)
    run(*arguments)
    assert len(dictionary.calls) == calls
    with pytest.raises(ValueError, match="other options .num_beams."):
        run(*arguments, "--num_beams", 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--languages", "de"], "either --input"),
        (["--input", "x.jsonl", "--languages", "de"], "nothing gives 'de'"),
        (["--input", "x.jsonl", "--model", "m", "--existing", "de.txt"], "LANGUAGE=FILE"),
        (["--input", "x.jsonl", "--model", "m", "--unit_size", "0"], "--unit_size is 0"),
    ],
)
def test_impossible_options_are_refused_before_any_work(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        run("--output", tmp_path / "out.jsonl", *arguments)


# --- sources ---


def test_text_files_of_parallel_lines_are_joined(tmp_path):
    for name, text in {"ids": "a\nb\n", "en": "A dog.\nA cat.\n", "de": "Ein Hund.\nEine Katze.\n"}.items():
        (tmp_path / f"{name}.txt").write_text(text)
    german = f"de={tmp_path / 'de.txt'}"
    run("--input", tmp_path / "en.txt", "--image_ids", tmp_path / "ids.txt",
        "--output", tmp_path / "out.jsonl", "--languages", "de", "--existing", german)  # fmt: skip
    assert read_rows(tmp_path / "out.jsonl") == [
        {"image_id": "a", "captions": {"en": "A dog.", "de": "Ein Hund."}},
        {"image_id": "b", "captions": {"en": "A cat.", "de": "Eine Katze."}},
    ]


def test_existing_translations_in_every_layout_and_the_rest_by_a_model(dictionary, tmp_path):
    rows = [
        {"image_id": i, "captions": {"en": t}}
        for i, t in [("a", "A dog."), ("a", "One dog."), ("b", "A cat.")]
    ]
    source = write_rows(tmp_path / "in.jsonl", rows)
    (tmp_path / "de.txt").write_text(
        "Ein Hund.\nDer Hund.\nEine Katze.\n"
    )  # line by line, ids from the source
    (tmp_path / "fr.tsv").write_text("caption\turl\timage_id\nUn chat.\tx\tb\nUn chien.\ty\ta\n")
    ja = [{"image": "a", "caption": {"ja": "犬", "en": "ignored"}}, {"image": "b", "caption": "猫がいます"}]
    ja_file = write_rows(tmp_path / "ja.json", ja)
    existing = [f"de={tmp_path / 'de.txt'}", f"fr={tmp_path / 'fr.tsv'}", f"ja={ja_file}"]
    run("--input", source, "--output", tmp_path / "out.jsonl", "--model", "m", "--languages", "de", "fr",
        "ja", "--tsv_columns", "caption", "url", "image_id", "--existing", *existing)  # fmt: skip
    found = [row["captions"] for row in read_rows(tmp_path / "out.jsonl")]
    assert found[0] == {"en": "A dog.", "de": "Ein Hund.", "fr": "Un chien.", "ja": "犬"}
    assert found[1]["de"] == "Der Hund." and found[1]["fr"] == "FR .god enO" and "ja" not in found[1]
    assert found[2] == {"en": "A cat.", "de": "Eine Katze.", "fr": "Un chat.", "ja": "猫がいます"}


def test_caption_rows_and_named_fields(tmp_path):
    rows = [{"image_id": "a", "language": "en", "caption": "A  dog."}]
    plain = CaptionSource([write_rows(tmp_path / "a.jsonl", rows)])
    assert list(plain.rows()) == [{"image_id": "a", "captions": {"en": "A dog."}, "alignment": {}}]
    named = write_rows(tmp_path / "b.jsonl", [{"key": 7, "alt": "A dog."}])
    source = CaptionSource([named], image_field="key", caption_field="alt")
    assert [row["image_id"] for row in source.rows()] == ["7"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.tsv", "x\ty\nz\n", "row 2: found 1 columns, expected the 2 columns"),
        ("a.txt", "A dog.\n", "captions without image ids"),
        (
            "a.jsonl",
            '{"picture": 1}\n',
            "row 1: found the fields picture, expected one of the fields image_id",
        ),
        ("a.jsonl", '{"image": "a", "caption": ""}\n', "field 'en': found '', expected a non-empty caption"),
    ],
)
def test_malformed_sources(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        list(CaptionSource([str(tmp_path / name)]).rows())


def test_line_counts_must_agree(tmp_path):
    for name, text in {"ids": "a\nb\n", "en": "A dog.\n"}.items():
        (tmp_path / name).write_text(text)
    source = CaptionSource([str(tmp_path / "en")], image_ids=str(tmp_path / "ids"))
    with pytest.raises(DataError, match="row 2: .*as many lines"):
        list(source.rows())


# --- object labels ---


def test_labels_gain_languages_and_rejected_names_fall_back(monkeypatch, tmp_path):
    names = {"dog": "Hund", "cat": "Katze", "zebra crossing": ""}

    class Words(Dictionary):
        def __call__(self, texts):
            return [names[text] for text in texts]

    monkeypatch.setattr(translation, "Translator", Words)
    labels = {"en": ["dog", "cat", "zebra crossing"], "fr": ["chien", "chat", "passage"]}
    (tmp_path / "labels.json").write_text(json.dumps(labels))
    run("--labels", tmp_path / "labels.json", "--output", tmp_path / "new.json", "--languages", "de", "fr",
        "--model", "m")  # fmt: skip
    expected = labels | {"de": ["Hund", "Katze", "zebra crossing"]}
    assert json.loads((tmp_path / "new.json").read_text()) == expected
    fallbacks = json.loads((tmp_path / "new.report.json").read_text())["fallbacks"]
    assert fallbacks == {"de": {"zebra crossing": {"translation": "", "rejected": "empty"}}}


# --- restarts and processes, with a real (random) model ---


def command(captions_file, out, model, *more) -> list[str]:
    return [sys.executable, "prepare_corpus.py", "translate", "--input", captions_file, "--output", str(out),
            "--languages", "de", "fr", "--model", str(model), "--num_beams", "1", "--unit_size", "4",
            *more]  # fmt: skip


ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def outputs(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_killed_and_restarted_gives_the_same_bytes(captions_file, marian, tmp_path):
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    undisturbed, killed = tmp_path / "whole/out.jsonl", tmp_path / "killed/out.jsonl"
    arguments = command(captions_file, undisturbed, marian)
    run(*arguments[3:])
    process = subprocess.Popen(
        command(captions_file, killed, marian), cwd=REPOSITORY, env=ENVIRONMENT, stderr=subprocess.DEVNULL
    )
    results = Path(f"{killed}.work") / "results"
    while process.poll() is None and len(list(results.rglob("*.jsonl"))) < 3:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not killed.exists()
    run(*command(captions_file, killed, marian)[3:])
    assert outputs(tmp_path / "killed") == outputs(tmp_path / "whole")


def test_two_ranks_give_the_same_bytes(dictionary, captions_file, tmp_path, monkeypatch):
    """As `torchrun` starts them: rank 1 waits for the plan of rank 0, rank 0 for the units of rank 1."""
    monkeypatch.setattr(translation, "POLL_SECONDS", 0.01)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    run(*command(captions_file, tmp_path / "one/out.jsonl", "m")[3:])
    flags = command(captions_file, tmp_path / "two/out.jsonl", "m", "--keep_work_dir", "true")[3:]
    (args,) = parse((translation.TranslationArguments,), flags)
    second = threading.Thread(target=translation.translate_captions, args=(args, 1, 2))
    second.start()
    translation.translate_captions(args, 0, 2)
    second.join()
    shutil.rmtree(tmp_path / "two/out.jsonl.work")
    assert outputs(tmp_path / "one") == outputs(tmp_path / "two")


class Kill(BaseException):
    """Ends a run at a chosen moment."""


def test_a_stop_before_any_file_is_put_in_place_changes_nothing(
    dictionary, captions_file, tmp_path, monkeypatch
):
    """Stops before the 1st, 2nd, … rename of a run, each time going on with what the last stop left."""
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
    flags = [
        "--input",
        captions_file,
        "--languages",
        "de",
        "fr",
        "--model",
        "m",
        "--unit_size",
        15,
        "--output",
    ]
    run(*flags, tmp_path / "whole/out.jsonl")
    replace, stops = os.replace, 0
    while not (tmp_path / "stopped/out.jsonl").exists():
        renames = iter(range(stops))

        def stop(*args, renames=renames):
            if next(renames, None) is None:
                raise Kill
            replace(*args)

        monkeypatch.setattr(os, "replace", stop)
        with contextlib.suppress(Kill):
            run(*flags, tmp_path / "stopped/out.jsonl")
        stops += 1
    assert stops > 6
    assert outputs(tmp_path / "stopped") == outputs(tmp_path / "whole")


def test_summary_tells_throughput_per_core(captions_file, marian, tmp_path, capsys, caplog):
    caplog.set_level(logging.INFO)
    run(*command(captions_file, tmp_path / "out.jsonl", marian)[3:])
    assert "per core:" in capsys.readouterr().out
