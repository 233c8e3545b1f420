"""What a fine-tuning or evaluation starts from: the configuration and processor of a checkpoint, and its limits."""

from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig

from processing_uc2 import UC2Processor
from uc2.data_error import DataError, Found
from uc2.region_store import RegionStore


def load_config(name_or_path: str) -> PreTrainedConfig:
    """The configuration of a UC2 or XLM-R model; DataError if there is none."""
    try:
        return AutoConfig.from_pretrained(name_or_path)
    except (OSError, ValueError) as error:
        expected = "a folder or Hub id of a UC2 or XLM-R model"
        raise DataError(field="model_name_or_path", found=name_or_path, expected=expected) from error


def load_processor(name_or_path: str, store: RegionStore) -> UC2Processor:
    """The checkpoint's processor, or a new one around an XLM-R tokenizer.

    Raises:
        DataError: there is no model, or it reads features of another width than the store's.
    """
    if load_config(name_or_path).model_type == "xlm-roberta":
        return UC2Processor(AutoTokenizer.from_pretrained(name_or_path), feature_size=store.feature_size)
    processor = UC2Processor.from_pretrained(name_or_path)
    if processor.feature_size != store.feature_size:
        raise DataError(
            file=store.paths[0],
            field="features",
            found=Found(f"features of width {store.feature_size}"),
            expected=f"{processor.feature_size}, as the model {name_or_path} has it",
        )
    return processor


def check_max_length(max_length: int, config: PreTrainedConfig) -> None:
    """A text has room for `<s>`, `</s>` and a token between them, and a position for each of its tokens."""
    most = config.max_position_embeddings - config.pad_token_id - 1
    if not 3 <= max_length <= most:
        raise DataError(field="max_length", found=max_length, expected=f"3 to {most}, which the model can take")
