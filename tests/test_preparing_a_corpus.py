"""The trial of docs/preparing_a_corpus.md: its commands, from raw images and English captions to trained models."""

import json
import os
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import prepare_corpus
import run_pretraining
from uc2 import stand_ins
from uc2.region_store import RegionStore
from uc2.rows import load_parallel_captions

DOCUMENT = Path(prepare_corpus.__file__).parent / "docs" / "preparing_a_corpus.md"
SCRIPTS = {
    "-m uc2.stand_ins": stand_ins.main,
    "prepare_corpus.py": prepare_corpus.main,
    "run_pretraining.py": run_pretraining.main,
}
WORDS = {
    "en": ("A {} lies on the {}.", ["dog", "cat", "ball", "book", "cup"], ["sofa", "table"]),
    "de": ("{} liegt auf dem {}.", ["Ein Hund", "Eine Katze", "Ein Ball", "Ein Buch", "Ein Krug"], ["Sofa", "Tisch"]),
    "fr": ("{} est sur {}.", ["Un chien", "Un chat", "Un ballon", "Un livre", "Une tasse"], ["le canapé", "la table"]),
    "cs": ("{} leží na {}.", ["Pes", "Kočka", "Míč", "Kniha", "Hrnek"], ["pohovce", "stole"]),
    "ja": ("{}が{}の上にあります。", ["犬", "猫", "ボール", "本", "カップ"], ["ソファー", "テーブル"]),
    "zh": ("一个{}在{}上面。", ["小狗", "小猫", "皮球", "书本", "杯子"], ["沙发", "桌子"]),
}


def caption(language: str, number: int) -> str:
    sentence, things, places = WORDS[language]
    return sentence.format(things[number % 5], places[number // 5])


@pytest.fixture
def trial(tmp_path, monkeypatch):
    """Ten photographs and their captions, as the document asks for them."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    rng = np.random.default_rng(0)
    rows = []
    for number in range(10):
        pixels = rng.integers(0, 256, (6, 8, 3), np.uint8)
        Image.fromarray(pixels).resize((320, 240), Image.Resampling.BICUBIC).save(f"photos/{number}.jpg")
        rows.append({"image_id": str(number), "captions": {code: caption(code, number) for code in WORDS}})
    english = [row | {"captions": {"en": row["captions"]["en"]}} for row in rows]
    for name, content in (("captions.jsonl", rows), ("captions_en.jsonl", english)):
        Path(name).write_text("".join(json.dumps(row) + "\n" for row in content))
    Path("objects_vocab.txt").write_text("".join(f"thing {number}\n" for number in range(12)))
    return rows


def commands() -> list[list[str]]:
    """The command lines of the document's last block."""
    block = re.findall(r"```bash\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)[-1]
    return [shlex.split(line) for line in block.replace("\\\n", " ").splitlines()]


def run(words: list[str]) -> None:
    assert words[0] == "python"
    count = 3 if words[1] == "-m" else 2
    script = SCRIPTS[" ".join(words[1:count])]
    more = ["--num_classes", "12"] if script is stand_ins.main else []
    script([*words[count:], *more])


def test_the_trial_of_the_document(trial):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for words in commands():
            run(words)
    finally:
        torch.set_num_threads(threads)
    # The translator knows its captions, so the corpus is the one it was taught.
    aligned = load_parallel_captions("aligned.jsonl")
    assert [row["captions"] for row in aligned] == [row["captions"] for row in trial]
    assert all(set(row["alignment"]) == set(WORDS) - {"en"} for row in map(json.loads, open("aligned.jsonl")))
    regions, grid = RegionStore("regions"), RegionStore("grid")
    assert set(regions) == set(grid) == {str(number) for number in range(10)}
    assert (regions.num_classes, grid.has_classes) == (12, False)
    labels = json.loads(Path("labels.json").read_text())
    assert {code: len(names) for code, names in labels.items()} == dict.fromkeys(WORDS, 12)
    for folder in ("runs/trial", "runs/trial-grid"):
        state = json.loads(Path(folder, "trainer_state.json").read_text())
        assert state["global_step"] == 4 and os.path.exists(f"{folder}/model.safetensors")
