"""Turns photographs or others' feature files and English captions into a pre-training corpus.

python prepare_corpus.py COMMAND --help
"""

import argparse
import importlib
import sys

COMMANDS = {
    "translate": ("uc2.translation", "captions and object labels into other languages, or join translations"),
    "align": ("uc2.word_alignment", "links between the words of translated captions, for VTLM"),
    "regions": ("uc2.region_extraction", "photographs to a region store, with a detector or grid features"),
    "import": ("uc2.region_import", "others' feature files (LMDB, HDF5, TSV, npz) to a region store"),
    "quantise": ("uc2.region_quantisation", "a region store with smaller features or class probabilities"),
    "scenes": ("uc2.scenes", "a small demo corpus of drawn scenes, with captions in six languages"),
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="prepare_corpus.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="commands:\n" + "\n".join(f"  {name:10} {text}" for name, (_, text) in COMMANDS.items()),
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of those below")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="see COMMAND --help")
    args = parser.parse_args(argv)
    # Imported only now: no command should need what another one does (a detector, LMDB, Fast Align).
    from uc2.script_errors import told_in_one_sentence

    with told_in_one_sentence():
        importlib.import_module(COMMANDS[args.command][0]).main(args.arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
