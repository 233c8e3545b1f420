"""What the Hub's metadata checker is known to refuse in a model card (its endpoint /api/validate-yaml), as rules.

From the documentation of model cards and model-index (huggingface.co/docs/hub/model-cards); not the checker itself.
"""

import math
import re

import yaml

# The identifiers that this project writes, out of the Hub's list of licences.
LICENSES = {"apache-2.0", "mit", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "other"}
TASKS = {
    "feature-extraction",
    "zero-shot-image-classification",
    "visual-question-answering",
    "object-detection",
}
LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z0-9]{2,8})*|multilingual|code")
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+|[\w.-]+", re.ASCII)
RESULT_FIELDS = {"task": ("type",), "dataset": ("name", "type")}


def metadata_errors(card: str) -> list[str]:
    """The errors in a card's metadata, none for a valid one."""
    block = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", card, re.DOTALL)
    if block is None:
        return []  # the Hub only warns of a card without metadata
    try:
        data = yaml.safe_load(block[1])
    except yaml.YAMLError as error:
        return [f"no YAML: {error}"]
    if not isinstance(data, dict):
        return ["the metadata must be a mapping"]
    errors = []
    if data.get("license") not in {None, *LICENSES}:
        errors.append(f'"license" must be one of the Hub\'s, found {data["license"]!r}')
    if data.get("pipeline_tag") not in {None, *TASKS}:
        errors.append(f'"pipeline_tag" {data["pipeline_tag"]!r} is no task')
    for name, pattern in (("language", LANGUAGE), ("base_model", REPOSITORY), ("datasets", REPOSITORY)):
        for value in _as_list(data.get(name)):
            if not isinstance(value, str) or not pattern.fullmatch(value):
                errors.append(f'"{name}" holds {value!r}')
    if any(not isinstance(tag, str) for tag in _as_list(data.get("tags"))):
        errors.append('"tags" must be strings')
    return errors + _model_index_errors(data.get("model-index", []))


def _as_list(value) -> list:
    return [] if value is None else value if isinstance(value, list) else [value]


def _model_index_errors(index) -> list[str]:
    if not isinstance(index, list):
        return ['"model-index" must be an array']
    errors = []
    for place, model in enumerate(index):
        where = f"model-index[{place}]"
        if not isinstance(model.get("name"), str):
            errors.append(f'"{where}.name" is required')
        if not isinstance(model.get("results"), list):
            errors.append(f'"{where}.results" must be an array')
            continue
        for number, result in enumerate(model["results"]):
            for part, names in RESULT_FIELDS.items():
                for name in names:
                    if not isinstance(result.get(part, {}).get(name), str):
                        errors.append(f'"{where}.results[{number}].{part}.{name}" is required')
            if not result.get("metrics"):
                errors.append(f'"{where}.results[{number}].metrics" is required')
            for metric in result.get("metrics", []):
                value = metric.get("value")
                if not isinstance(metric.get("type"), str):
                    errors.append(f'"{where}.results[{number}].metrics" need a type')
                if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                    errors.append(f'"{where}.results[{number}].metrics" hold {value!r}, no finite number')
    return errors
