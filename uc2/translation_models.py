"""Any transformers seq2seq translation model behind one call: texts in, translations out.

Model families name languages differently and are told the target in different ways; `_FAMILIES` has it all:

| family  | the target language is told by                         | "de" is called |
|---------|--------------------------------------------------------|----------------|
| marian  | one model per pair; or a prefix token `>>deu<<`        | de, deu        |
| m2m100  | the first token generated                              | __de__         |
| nllb    | the first token generated                              | deu_Latn       |
| mbart   | the first token generated                              | de_DE          |
| madlad  | a prefix token                                         | <2de>          |
| other   | the prefix the user gives, if any                      |                |
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoTokenizer, BitsAndBytesConfig

from uc2.data_error import OptionError

DTYPES = ("float32", "bfloat16", "float16", "int8")

# ISO 639-1 code -> NLLB code, mBART-50 code. Codes of other languages are passed as the model knows them.
_NLLB = {
    "ar": "arb_Arab", "bg": "bul_Cyrl", "cs": "ces_Latn", "da": "dan_Latn", "de": "deu_Latn",
    "el": "ell_Grek", "en": "eng_Latn", "es": "spa_Latn", "fa": "pes_Arab", "fi": "fin_Latn",
    "fr": "fra_Latn", "he": "heb_Hebr", "hi": "hin_Deva", "hu": "hun_Latn", "id": "ind_Latn",
    "it": "ita_Latn", "ja": "jpn_Jpan", "ko": "kor_Hang", "nl": "nld_Latn", "no": "nob_Latn",
    "pl": "pol_Latn", "pt": "por_Latn", "ro": "ron_Latn", "ru": "rus_Cyrl", "sk": "slk_Latn",
    "sv": "swe_Latn", "sw": "swh_Latn", "ta": "tam_Taml", "th": "tha_Thai", "tr": "tur_Latn",
    "uk": "ukr_Cyrl", "vi": "vie_Latn", "zh": "zho_Hans",
}  # fmt: skip
_MBART = {
    "ar": "ar_AR", "cs": "cs_CZ", "de": "de_DE", "en": "en_XX", "es": "es_XX", "fi": "fi_FI", "fr": "fr_XX",
    "hi": "hi_IN", "id": "id_ID", "it": "it_IT", "ja": "ja_XX", "ko": "ko_KR", "nl": "nl_XX", "pl": "pl_PL",
    "pt": "pt_XX", "ro": "ro_RO", "ru": "ru_RU", "sv": "sv_SE", "sw": "sw_KE", "ta": "ta_IN", "th": "th_TH",
    "tr": "tr_TR", "uk": "uk_UA", "vi": "vi_VN", "zh": "zh_CN",
}  # fmt: skip
# Multi-target Marian models name languages by ISO 639-3, some with the script.
MARIAN_CODES = {"zh": "cmn_Hans", "ja": "jpn", "no": "nob"} | {
    code: nllb.split("_")[0] for code, nllb in _NLLB.items() if code not in ("zh", "ja", "no")
}


@dataclass(frozen=True)
class _Family:
    codes: Mapping[str, str]
    token: str
    """How a language code is written as a token of the vocabulary."""
    forced_first: bool = False
    """The target token is forced as the first one generated, and the source code is set on the tokenizer."""
    required: bool = True
    """The vocabulary must have the token."""


_FAMILIES = {
    "marian": _Family(MARIAN_CODES, ">>{}<<", required=False),
    "m2m100": _Family({}, "__{}__", forced_first=True),
    "nllb": _Family(_NLLB, "{}", forced_first=True),
    "mbart": _Family(_MBART, "{}", forced_first=True),
    "madlad": _Family({}, "<2{}>"),
    "other": _Family({}, "", required=False),
}


def model_family(model_type: str, has_token: Callable[[str], bool]) -> str:
    """Name of the family: by the config's `model_type`, and by tokens only one of the look-alikes has."""
    if model_type in ("m2m_100", "nllb-moe"):
        return "nllb" if has_token("eng_Latn") else "m2m100"
    if model_type in ("t5", "mt5") and has_token("<2en>"):
        return "madlad"
    return model_type if model_type in ("marian", "mbart") else "other"


@dataclass
class Throughput:
    """What has been translated so far and how long it took."""

    texts: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        cores = torch.get_num_threads()
        core_seconds = cores * max(self.seconds, 1e-9)
        return (
            f"{self.texts} texts in {self.seconds:.1f} s on {cores} core(s), per core: "
            f"{self.texts / core_seconds:.2f} texts/s, {self.tokens / core_seconds:.1f} generated tokens/s"
        )


class Translator:
    """Translates texts of one language into another.

    Args:
        name: Hub id or folder of a seq2seq model; "{language}" in it stands for the target language.
        source: language of the texts.
        target: language to translate into.
        language_codes: {code: the model's own code} where the built-in table is wrong or lacks a language.
        prefix: text before every source text; "{language}" stands for the target language. For models that no
            family fits, such as T5 ("translate English to German: ").
        dtype: float32, bfloat16, float16; or int8: linear layers with 8-bit weights, on CPU by torch's
            dynamic quantization, on GPU by bitsandbytes.
        num_beams: beams of the search; 1 is greedy.
        batch_tokens: most source tokens of a batch, padding counted.
        max_source_tokens: longer source texts are cut.

    Raises:
        OptionError: the model does not know a language, or `dtype` is unknown.
    """

    def __init__(
        self,
        name: str,
        source: str,
        target: str,
        *,
        language_codes: Mapping[str, str] | None = None,
        prefix: str = "",
        dtype: str = "float32",
        device: str = "cpu",
        num_beams: int = 4,
        batch_tokens: int = 4096,
        max_source_tokens: int = 256,
    ):
        name = name.format(language=target)
        self.tokenizer = AutoTokenizer.from_pretrained(name)
        self.model = _load_model(name, dtype, device)
        self.throughput = Throughput()
        self._batch_tokens, self._max_source_tokens = batch_tokens, max_source_tokens
        family = model_family(self.model.config.model_type, self._has_token)
        codes = _FAMILIES[family].codes | (language_codes or {})
        token = self._language_token(name, family, codes, target)
        forced_first = _FAMILIES[family].forced_first
        if forced_first:
            self._language_token(name, family, codes, source)
            self.tokenizer.src_lang = codes.get(source, source)
        self._prefix = prefix.format(language=target) or (f"{token} " if token and not forced_first else "")
        first = {"forced_bos_token_id": self.tokenizer.convert_tokens_to_ids(token)} if forced_first else {}
        self._search = {"num_beams": num_beams, "do_sample": False} | first

    def _has_token(self, token: str) -> bool:
        found = self.tokenizer.convert_tokens_to_ids(token)
        return found is not None and found != self.tokenizer.unk_token_id

    def _language_token(self, name: str, family: str, codes: Mapping[str, str], language: str) -> str | None:
        """The vocabulary's token for `language`, or None where the family can do without."""
        template = _FAMILIES[family].token
        if not template:
            return None
        for code in (codes.get(language, language), language):
            if self._has_token(template.format(code)):
                return template.format(code)
        several = getattr(self.tokenizer, "supported_language_codes", [])  # of multi-target Marian models
        if not _FAMILIES[family].required and not several:
            return None
        wanted, known = template.format(codes.get(language, language)), several[:20] or list(codes)
        raise OptionError(
            f"{name} ({family}) has no token {wanted!r} for the language {language!r}; map it with "
            f"language_codes. Known: {', '.join(known)}"
        )

    def __call__(self, texts: Sequence[str]) -> list[str]:
        """A translation for each text. Equal input gives equal output, since the batches are the same."""
        started = time.perf_counter()
        encoded = self.tokenizer(
            [self._prefix + text for text in texts], truncation=True, max_length=self._max_source_tokens
        )["input_ids"]
        translations = [""] * len(texts)
        for batch in length_batches([len(ids) for ids in encoded], self._batch_tokens):
            for index, text in zip(batch, self._translate([encoded[i] for i in batch]), strict=True):
                translations[index] = text
        self.throughput.texts += len(texts)
        self.throughput.seconds += time.perf_counter() - started
        return translations

    @torch.inference_mode()
    def _translate(self, encoded: list[list[int]]) -> list[str]:
        inputs = self.tokenizer.pad({"input_ids": encoded}, return_tensors="pt").to(self.model.device)
        longest = 2 * inputs["input_ids"].shape[1] + 10
        output = self.model.generate(**inputs, max_length=longest, **self._search)
        self.throughput.tokens += int((output != self.model.config.pad_token_id).sum())
        return [text.strip() for text in self.tokenizer.batch_decode(output, skip_special_tokens=True)]


def length_batches(lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Indices in batches of like lengths, longest first: at most `max_tokens` with padding, or one text."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if batch and lengths[batch[0]] * (len(batch) + 1) > max_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _load_model(name: str, dtype: str, device: str):
    if dtype not in DTYPES:
        raise OptionError(f"unknown dtype {dtype!r}; choose one of {', '.join(DTYPES)}")
    if not AutoConfig.from_pretrained(name).is_encoder_decoder:
        raise OptionError(f"{name} is not a sequence-to-sequence model")
    if dtype != "int8":
        return AutoModelForSeq2SeqLM.from_pretrained(name, dtype=getattr(torch, dtype)).to(device).eval()
    if device.startswith("cuda"):
        settings = BitsAndBytesConfig(load_in_8bit=True)
        return AutoModelForSeq2SeqLM.from_pretrained(
            name, quantization_config=settings, device_map=device
        ).eval()
    model = AutoModelForSeq2SeqLM.from_pretrained(name, dtype=torch.float32).eval()
    return torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
