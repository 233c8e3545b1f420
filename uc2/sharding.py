"""Any command of `prepare_corpus.py` over many shards on a cluster, with Ray Data.

    python -m uc2.sharding translate --shards captions/*.jsonl --output_dir parallel \\
        --concurrency 64 --num_gpus 1 -- --languages de fr --model facebook/nllb-200-distilled-600M

Each shard is one call of the command, `COMMAND --input SHARD --output OUTPUT_DIR/SHARD …`. The commands are
restartable and write whole files, so a task that Ray repeats on another node goes on where the lost one was,
and a second run of the same line does only what is missing. Ray Data rather than Spark: the commands are
Python with models on GPUs, which Ray schedules as resources of a task, without a JVM; nothing here shuffles.
"""

import argparse
import importlib
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from uc2.data_error import OptionError

# Command -> module, option for the input, and the ending of an output ("" is a directory).
SHARDED_COMMANDS = {
    "translate": ("uc2.translation", "--input", ".jsonl"),
    "align": ("uc2.word_alignment", "--input", ".jsonl"),
    "regions": ("uc2.region_extraction", "--images", ""),
    "import": ("uc2.region_import", "--input", ""),
    "quantise": ("uc2.region_quantisation", "--input", ""),
}


def shard_tasks(command: str, shards: Iterable[str], output_dir: str, arguments: Sequence[str]) -> list[dict]:
    """One {"module", "argv", "output"} per shard.

    Raises:
        OptionError: the command is unknown, there is no shard, or two shards would write the same output.
    """
    if command not in SHARDED_COMMANDS:
        raise OptionError(f"unknown command {command!r}; choose one of {', '.join(SHARDED_COMMANDS)}")
    module, option, ending = SHARDED_COMMANDS[command]
    tasks: dict[str, dict] = {}
    for shard in shards:
        output = str(Path(output_dir) / f"{_shard_name(shard)}{ending}")
        if output in tasks:
            raise OptionError(f"two shards are named {_shard_name(shard)!r}, which would write {output} twice")
        argv = [option, shard, "--output", output, *arguments]
        tasks[output] = {"module": module, "argv": shlex.join(argv), "output": output}
    if not tasks:
        raise OptionError("no shards")
    return list(tasks.values())


def _shard_name(shard: str) -> str:
    """data/part-00001.jsonl.gz -> part-00001"""
    return Path(shard).name.split(".")[0]


def run_task(task: dict) -> dict:
    """Runs one shard's command in this process, unless its output is there already."""
    done = Path(task["output"]).exists()
    if not done:
        importlib.import_module(task["module"]).main(shlex.split(task["argv"]))
    return {"output": task["output"], "was_done": done}


def map_shards(
    tasks: Sequence[dict], *, concurrency: int, num_cpus: float = 1, num_gpus: float = 0
) -> list[dict]:
    """`run_task` over all tasks with Ray Data; results in the order of the tasks.

    Args:
        tasks: from `shard_tasks`; paths must be visible to all nodes.
        concurrency: most shards at a time.
        num_cpus, num_gpus: what Ray reserves for one shard.
    """
    import ray.data  # optional: everything else works without Ray

    # One block per task: a block is what Ray Data schedules, and repeats if a node is lost.
    dataset = ray.data.from_items(list(tasks), override_num_blocks=len(tasks))
    mapped = dataset.map(run_task, concurrency=concurrency, num_cpus=num_cpus, num_gpus=num_gpus)
    results = {row["output"]: row for row in mapped.take_all()}
    return [results[task["output"]] for task in tasks]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m uc2.sharding", description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=SHARDED_COMMANDS)
    parser.add_argument(
        "--shards", nargs="+", required=True, help="input files or directories, one task each"
    )
    parser.add_argument("--output_dir", required=True, help="gets one output per shard")
    parser.add_argument("--concurrency", type=int, default=1, help="shards at a time")
    parser.add_argument("--num_cpus", type=float, default=1, help="cores reserved per shard")
    parser.add_argument("--num_gpus", type=float, default=0, help="GPUs reserved per shard")
    argv = list(sys.argv[1:] if argv is None else argv)
    own, arguments = _split(argv)
    args = parser.parse_args(own)
    tasks = shard_tasks(args.command, args.shards, args.output_dir, arguments)
    resources = {"concurrency": args.concurrency, "num_cpus": args.num_cpus, "num_gpus": args.num_gpus}
    results = map_shards(tasks, **resources)
    print(f"{len(results)} shards, {sum(result['was_done'] for result in results)} of them done before")


def _split(argv: list[str]) -> tuple[list[str], list[str]]:
    """What stands before and after the first "--"."""
    position = argv.index("--") if "--" in argv else len(argv)
    return argv[:position], argv[position + 1 :]


if __name__ == "__main__":
    main()
