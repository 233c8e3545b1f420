"""Publishing on the Hugging Face Hub: what a run left behind becomes one commit, or nothing does.

    python -m uc2.hub runs/uc2 org/uc2

The repository gets weights, code, processor, object labels, card, results, curves and TensorBoard logs. Checkpoints
stay where they are: they hold the optimizer's state, and `training_args.bin` beside them the user's token.
"""

import argparse
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import HubStrategy

from uc2.data_error import DataError

WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
# Of the files in the folder itself.
PUBLISHED = (*WEIGHTS, "*.json", "*.py", "*.md", "*.csv", "*.png", "*.jinja", "LICENSE")
# The Trainer's log with its local paths, and the batch at which an earlier run stopped.
KEPT_AT_HOME = ("trainer_state.json", "non_finite_batch_*.json")
# Deeper down: TensorBoard's logs, and the adapter of which a model was made.
DEEPER = ("*tfevents*", "adapter/*")
# The line of a card's examples that says where to load from.
CARD_NAME = re.compile(r'^name = ".*"$', re.MULTILINE)


class HubError(Exception):
    """The Hub refused or could not be reached; one sentence with the reason and what to do."""


class PublishingTrainer(Trainer):
    """A Trainer that uploads its output folder when `push_to_hub` is called, at no other time, with the card in it."""

    def create_model_card(self, *args, **kwargs) -> None:
        """The script writes the card; the Trainer's own would replace it."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        # As an internal call, it does not push: there are no results yet.
        super().save_model(output_dir, _internal_call=True)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """The Trainer would upload at every checkpoint, with what must stay at home."""

    def push_to_hub(
        self, commit_message: str = "End of training", *, token: str | None = None, revision: str | None = None
    ) -> CommitInfo | None:
        """Uploads the output folder, from the first process; see `publish`."""
        if not self.is_world_process_zero():
            return None
        return publish(
            self.args.output_dir,
            self.args.hub_model_id or Path(self.args.output_dir).absolute().name,
            message=commit_message,
            token=token or self.args.hub_token,
            revision=revision or self.args.hub_revision,
            private=self.args.hub_private_repo,
        )


def open_repository(args: TrainingArguments) -> None:
    """Before a run's work: makes its repository, so that a wrong token stops the run now and not at its end.

    Sets `args.hub_model_id` to the repository's full name; does nothing without `args.push_to_hub`.

    Raises:
        DataError: a `hub_strategy` that uploads checkpoints.
        HubError: the repository cannot be made or written.
    """
    if not args.push_to_hub:
        return
    if args.hub_strategy not in (HubStrategy.END, HubStrategy.EVERY_SAVE):
        expected = "end; checkpoints hold the optimizer's state and are not uploaded"
        raise DataError(field="hub_strategy", found=args.hub_strategy.value, expected=expected)
    if args.process_index == 0:
        name = args.hub_model_id or Path(args.output_dir).absolute().name
        with _told_in_one_sentence(f"{name} on the Hub cannot be written", args.hub_token):
            api = HfApi(token=args.hub_token)
            role = api.whoami().get("auth", {}).get("accessToken", {}).get("role")
            if role == "read":
                raise HubError(f"{name} on the Hub cannot be written: the token is one for reading only")
            args.hub_model_id = api.create_repo(name, private=args.hub_private_repo, exist_ok=True).repo_id


def publish(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    message: str = "Upload UC2",
    token: str | None = None,
    revision: str | None = None,
    private: bool | None = None,
) -> CommitInfo:
    """Uploads the folder of a saved model in one commit; when interrupted, the repository stays as it was.

    Large files that arrived before an interruption are not sent again. In the card, the examples load from `repo_id`.
    Weights of an earlier commit that the folder does not have are deleted from the repository, since they might be
    loaded in place of the new ones.

    Args:
        repo_id: `organisation/name`; a name alone is put under the user's own. Made if there is none.
        token: with write access; without it, that of `hf auth login` or of the environment's HF_TOKEN.
        revision: branch to commit to, made if there is none; main if left out.
        private: whether a new repository is private.
    Raises:
        HubError: there is no model or no card in the folder, or the Hub could not take it. What to do is in the words.
    """
    paths = files_to_publish(folder)
    again = f"everything is saved in {folder}; to upload it: python -m uc2.hub {folder} {repo_id}"
    with _told_in_one_sentence(f"{repo_id} on the Hub was not changed", token, again):
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        present = api.list_repo_files(repo_id, revision=revision)
        stale = [path for path in present if path not in paths and _matches(path, WEIGHTS)]
        operations = [CommitOperationDelete(path) for path in stale]
        operations += [CommitOperationAdd(path, _content(Path(folder, path), repo_id)) for path in paths]
        # Not `upload_folder`: with the xet protocol, it makes several commits.
        return api.create_commit(repo_id, operations, commit_message=message, revision=revision)


def files_to_publish(folder: str | os.PathLike) -> list[str]:
    """The paths within the folder that belong into its repository, sorted.

    Raises:
        HubError: there are no weights or no README.md.
    """
    folder = Path(folder)
    paths = [path.name for path in folder.glob("*") if path.is_file() and _matches(path.name, PUBLISHED)]
    paths = [name for name in paths if not _matches(name, (".*", *KEPT_AT_HOME))]
    for path in folder.glob("*/**/*"):
        within = path.relative_to(folder)
        hidden = any(part.startswith(("checkpoint-", "_", ".")) for part in within.parts)
        if path.is_file() and _matches(within.as_posix(), DEEPER) and not hidden:
            paths.append(within.as_posix())
    for wanted in ("*.safetensors", "README.md"):
        if not any(fnmatch(path, wanted) for path in paths):
            raise HubError(f"{folder} has no {wanted}, so there is no model with its card to upload")
    return sorted(paths)


def _matches(path: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch(path, pattern) for pattern in patterns)


def _content(path: Path, repo_id: str) -> bytes | str:
    """The file; of a card, its text with the examples loading from the repository."""
    if path.name != "README.md":
        return str(path)
    return CARD_NAME.sub(f'name = "{repo_id}"', path.read_text(encoding="utf-8")).encode()


@contextmanager
def _told_in_one_sentence(what: str, token: str | None, what_now: str | None = None) -> Iterator[None]:
    try:
        yield
    except HubError:
        raise
    except Exception as error:  # the client's errors have no common class: HTTP, connection, value, runtime
        raise HubError("; ".join(filter(None, [f"{what}: {_reason(error, token)}", what_now]))) from error


def _reason(error: BaseException, token: str | None) -> str:
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    how = "log in with `hf auth login`, or set HF_TOKEN to a token with write access"
    if token is None and get_token() is None:
        return f"there is no token; {how}"
    if status == 401:
        return f"the Hub does not accept the token; {how}"
    if status == 403:
        return f"the token may not write there; {how}"
    words = " ".join(str(error).split())
    return words if error.__cause__ is None else f"{words} ({' '.join(str(error.__cause__).split())})"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m uc2.hub", description=__doc__.partition("\n")[0])
    parser.add_argument("folder", help="the output folder of a run, or any folder with a saved model and its card")
    parser.add_argument("repo_id", help="organisation/name of the repository on the Hub")
    parser.add_argument("--message", default="Upload UC2", help="of the commit")
    parser.add_argument("--revision", help="branch to commit to; made if there is none")
    parser.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    options = vars(parser.parse_args(argv))
    try:
        commit = publish(options.pop("folder"), options.pop("repo_id"), **options)
    except HubError as error:
        raise SystemExit(f"error: {error}") from error
    print(commit.commit_url)


if __name__ == "__main__":
    main()
