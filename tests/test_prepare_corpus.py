"""The command line of `prepare_corpus.py`: it finds the command and hands the rest on."""

import subprocess
import sys
import types
from pathlib import Path

import pytest

import prepare_corpus

SCRIPT = Path(prepare_corpus.__file__)


@pytest.mark.parametrize("command", prepare_corpus.COMMANDS)
def test_each_command_reaches_its_module_with_its_arguments(command, monkeypatch):
    module, received = types.ModuleType("stub"), []
    module.main = received.append
    monkeypatch.setitem(sys.modules, prepare_corpus.COMMANDS[command][0], module)
    prepare_corpus.main([command, "config.yaml", "--output", "x", "--help"])
    assert received == [["config.yaml", "--output", "x", "--help"]]


@pytest.mark.parametrize("command", prepare_corpus.COMMANDS)
def test_each_command_is_there_and_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as exit_:
        prepare_corpus.main([command, "--help"])
    assert exit_.value.code == 0 and "--output" in capsys.readouterr().out


def test_help_lists_the_commands(capsys):
    with pytest.raises(SystemExit):
        prepare_corpus.main(["--help"])
    shown = capsys.readouterr().out
    assert all(f"{name} " in shown and text in shown for name, (_, text) in prepare_corpus.COMMANDS.items())


def test_unknown_command_names_the_choices(capsys):
    with pytest.raises(SystemExit) as exit_:
        prepare_corpus.main(["dance"])
    assert exit_.value.code == 2 and "translate" in capsys.readouterr().err


def test_nothing_heavy_is_imported_before_a_command_is_chosen():
    code = "import sys, prepare_corpus; assert not {'torch', 'transformers', 'uc2'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], cwd=SCRIPT.parent, check=True)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["import", "--input", "none.tsv", "--output", "o"], "error: none.tsv: found no such file"),
        (["regions", "--images", ".", "--output", "o"], "error: Give either --detector or --backbone."),
        (["translate", "--output", "o"], "error: give either --input (captions) or --labels (object labels)"),
        (
            ["align", "--input", "x", "--output", "o", "--tokenizer", "t", "--num_processes", "0"],
            "error: --num_processes is",
        ),
    ],
)
def test_what_cannot_be_is_told_in_one_sentence(arguments, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_:
        prepare_corpus.main(arguments)
    assert exit_.value.code.startswith(sentence) and "\n" not in exit_.value.code
