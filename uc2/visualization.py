"""Pictures of what a model does and how it learnt: word-to-region attention (paper Fig. 3), curves, grids.

Everything is drawn on `Figure` objects, never through pyplot: no global state, no display, safe in workers.
"""

import contextlib
import functools
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib import colormaps, font_manager
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from PIL import Image

from modeling_uc2.configuration_uc2 import OBJECTIVES
from uc2.atomic_files import atomic_file

DPI = 120
GREY = "0.55"
# Fonts with Chinese and Japanese characters; matplotlib falls back along the list, glyph by glyph.
CJK_FONTS = (
    "CJK",
    "IPA",
    "WenQuanYi",
    "Hiragino",
    "YaHei",
    "Yu Gothic",
    "MS Gothic",
    "Noto Sans JP",
    "Noto Sans SC",
)


# ---- figures ----


def new_figure(width: float, height: float) -> Figure:
    """An empty figure in inches, laid out when it is saved."""
    return Figure(figsize=(width, height), dpi=DPI, layout="constrained", facecolor="white")


def save_figure(figure: Figure, path: str | os.PathLike) -> Path:
    """Writes a PNG, whole or not at all; text in Chinese and Japanese where the machine has a font for it."""
    families = ["DejaVu Sans", *_cjk_fonts()]
    for text in figure.findobj(Text):
        text.set_fontfamily(families)
        text.set_text(_printable(text.get_text()))
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png")
    return Path(path)


@functools.cache
def _cjk_fonts() -> tuple[str, ...]:
    names = {font.name for font in font_manager.fontManager.ttflist}
    return tuple(sorted(name for name in names if any(part in name for part in CJK_FONTS)))


@functools.cache
def _characters() -> frozenset[int]:
    """Code points that the fonts in use can draw."""
    files = [font_manager.findfont(name) for name in ("DejaVu Sans", *_cjk_fonts())]
    return frozenset(code for file in files for code in font_manager.get_font(file).get_charmap())


def _printable(text: str) -> str:
    """The text with a run of characters that no font can draw replaced by one sign that says so."""
    drawn = (letter if letter.isspace() or ord(letter) in _characters() else "\0" for letter in text)
    return re.sub("\0+", "(no font)", "".join(drawn))


def _tidy(panel) -> None:
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(axis="y", color="0.92")
    panel.set_axisbelow(True)
    panel.tick_params(labelsize="small")


# ---- attention ----


@dataclass(frozen=True)
class WordAttention:
    """How a word attends to the regions of an image: `boxes (n, 4)` in [0, 1], `weights (n,)` of sum 1."""

    text: str
    word: str
    boxes: np.ndarray
    weights: np.ndarray


def word_attention(
    model, processor, text: str, word: str, region, *, layer: int | None = None, head: int | None = None
) -> WordAttention:
    """Attention from a word of the text to each region, rescaled to sum 1 over the regions.

    Averaged over the word's sub-words, and over layers and heads unless one is chosen.

    Args:
        model: any UC2 model; it is run in evaluation mode with eager attention and left as it was.
        region: a region item as the processor takes it.
        layer, head: indices from 0; negative ones count from the end.
    Raises:
        ValueError: the word is not in the text, or there is no such layer or head.
    """
    tokens = word_tokens(processor.tokenizer, text, word)
    network = getattr(model, "uc2", model)
    inputs = processor(text=[text], regions=[region], return_tensors="pt").to(network.device)
    with _eager_evaluation(network), torch.no_grad():
        attentions = torch.stack(network(**inputs, output_attentions=True).attentions)[:, 0].float().cpu()
    # (layers, heads, positions, positions), text first
    chosen = _pick(_pick(attentions, 0, layer, "layer"), 1, head, "head")
    to_regions = chosen[:, :, tokens, inputs["input_ids"].shape[1] :].mean(dim=(0, 1, 2)).numpy()
    boxes = inputs["region_boxes"][0].cpu().numpy()
    return WordAttention(text, word, boxes, to_regions / to_regions.sum())


def word_tokens(tokenizer, text: str, word: str) -> list[int]:
    """Positions of the sub-words of the word's first occurrence; lone space pieces ("▁") do not count."""
    start = text.find(word)
    if not word or start < 0:
        raise ValueError(f"the word {word!r} is not in the text {text!r}")
    encoded = tokenizer(text, return_offsets_mapping=True)
    pieces = tokenizer.convert_ids_to_tokens(encoded["input_ids"])
    return [
        position
        for position, (first, last) in enumerate(encoded["offset_mapping"])
        if first < start + len(word) and last > start and pieces[position] != "▁"
    ]


def _pick(attentions: torch.Tensor, axis: int, index: int | None, name: str) -> torch.Tensor:
    if index is None:
        return attentions
    size = attentions.shape[axis]
    if not -size <= index < size:
        raise ValueError(f"there is no {name} {index}; the model has {size}")
    return attentions.select(axis, index).unsqueeze(axis)


@contextlib.contextmanager
def _eager_evaluation(network) -> Iterator[None]:
    """Only eager attention gives its weights; the model's own settings come back afterwards."""
    implementation, training = network.config._attn_implementation, network.training
    network.set_attn_implementation("eager")
    network.eval()
    try:
        yield
    finally:
        network.set_attn_implementation(implementation)
        network.train(training)


def draw_word_attention(
    image,
    attentions: Mapping[str, WordAttention],
    path: str | os.PathLike,
    *,
    columns: int = 3,
    outlined: int = 3,
) -> Path:
    """The image once per word, its boxes shaded by attention; the strongest are outlined (paper Fig. 3).

    Args:
        image: a PIL image or the path of one.
        attentions: language (or any caption) -> attention of that panel's word.
        outlined: number of boxes with an outline and their share of the attention.
    """
    if not attentions:
        raise ValueError("there is no attention to draw")
    picture = _open(image)
    columns = min(columns, len(attentions))
    rows = math.ceil(len(attentions) / columns)
    panel_height = 4.2 * picture.height / picture.width
    figure = new_figure(4.2 * columns + 0.9, (panel_height + 0.6) * rows + 0.1)
    figure.get_layout_engine().set(h_pad=0.12)
    panels = figure.subplots(rows, columns, squeeze=False)
    for panel in panels.flat:
        panel.axis("off")
    for panel, (caption, attention) in zip(panels.flat, attentions.items(), strict=False):
        _draw_attention(panel, picture, attention, outlined)
        panel.set_title(f"{caption}: {attention.word}", fontsize=13, fontweight="bold", pad=18)
        panel.text(
            0.5,
            1.02,
            _shorten(attention.text),
            transform=panel.transAxes,
            ha="center",
            fontsize=8,
            color=GREY,
        )
    scale = figure.colorbar(ScalarMappable(cmap="inferno"), ax=panels, shrink=0.7, aspect=30, pad=0.01)
    scale.set_ticks([0, 1], labels=["median\nor less", "strongest"])
    scale.set_label("attention of the word", fontsize="small")
    return save_figure(figure, path)


def _draw_attention(panel, picture: Image.Image, attention: WordAttention, outlined: int) -> None:
    """Each pixel's heat is the strongest of the boxes over it; cold pixels show it dimmed, in grey."""
    height, width = picture.height, picture.width
    boxes = attention.boxes * [width, height, width, height]
    heat = np.zeros((height, width))
    for box, weight in zip(boxes, _contrast(attention.weights), strict=True):
        left, top, right, bottom = (int(round(value)) for value in box)
        heat[top:bottom, left:right] = np.maximum(heat[top:bottom, left:right], weight)
    colours = np.asarray(picture.convert("RGB"), float) / 255
    grey = np.asarray(picture.convert("L"), float)[..., None] / 255
    strength = heat[..., None]
    backdrop = strength * colours + (1 - strength) * (0.35 + 0.4 * grey)
    shade = colormaps["inferno"](0.15 + 0.75 * heat)[..., :3]
    panel.imshow(np.clip((1 - 0.45 * strength) * backdrop + 0.45 * strength * shade, 0, 1))
    for index in np.argsort(-attention.weights, kind="stable")[:outlined][::-1]:
        left, top, right, bottom = boxes[index]
        colour = colormaps["inferno"](0.25 + 0.7 * attention.weights[index] / attention.weights.max())
        panel.add_patch(
            Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor=colour, linewidth=2.2)
        )
        panel.text(
            left + 0.01 * width, top + 0.012 * height, f"{attention.weights[index]:.0%}",
            fontsize=8, color="white", va="top", bbox={"facecolor": "0.1", "edgecolor": colour, "pad": 1.5},
        )  # fmt: skip


def _contrast(weights: np.ndarray) -> np.ndarray:
    """Weights in [0, 1]: 1 for the strongest, 0 for the median and below, lest all boxes light up."""
    excess = np.clip(weights - np.median(weights), 0, None)
    return excess / excess.max() if excess.max() > 0 else weights / weights.max()


# ---- curves ----


def training_curves(
    log_history: Sequence[Mapping],
    path: str | os.PathLike,
    *,
    early_adaptation: Sequence[Mapping] = (),
    metrics: Sequence[str] = (),
) -> Path:
    """Losses above, accuracies below, a column per objective, from a Trainer's log history.

    Args:
        log_history: `loss_<objective>`, `eval_loss_<objective>`, `eval_accuracy_<objective>[_<language>]`
            over `step`; a run without objectives (fine-tuning) has one column, of `loss` and `eval_loss`.
        early_adaptation: the log history of that stage, drawn as a first column.
        metrics: names of logged values to draw in the lower row of a run without objectives.
    """
    objectives = [name for name in OBJECTIVES if any(_has_objective(line, name) for line in log_history)]
    columns = (["early adaptation"] if early_adaptation else []) + (objectives or ["fine-tuning"])
    figure = new_figure(max(6.0, 3.0 * len(columns)), 5.4)
    panels = figure.subplots(2, len(columns), squeeze=False, sharex="col")
    colours = _language_colours(log_history)
    for column, name in enumerate(columns):
        above, below = panels[:, column]
        above.set_title(name.upper() if name in OBJECTIVES else name, fontsize="medium", fontweight="bold")
        if name == "early adaptation":
            _draw_loss(above, early_adaptation, "loss")
            below.set_visible(False)
            above.tick_params(labelbottom=True)
            continue
        _draw_loss(above, log_history, f"loss_{name}" if name in OBJECTIVES else "loss")
        if name in OBJECTIVES:
            _draw_accuracies(below, log_history, f"eval_accuracy_{name}", colours)
        else:
            _draw_metrics(below, log_history, metrics)
    panels[0, 0].set_ylabel("loss")
    panels[1, 1 if early_adaptation else 0].set_ylabel("accuracy" if objectives else "held-out metric")
    figure.supxlabel("optimiser step", fontsize="small")
    return save_figure(figure, path)


def _has_objective(line: Mapping, name: str) -> bool:
    return f"loss_{name}" in line or f"eval_loss_{name}" in line


def _series(log_history: Sequence[Mapping], key: str) -> tuple[list[float], list[float]]:
    points = [(line["step"], line[key]) for line in log_history if key in line and "step" in line]
    return [step for step, _ in points], [value for _, value in points]


def _draw_loss(panel, log_history: Sequence[Mapping], key: str) -> None:
    steps, values = _series(log_history, key)
    panel.plot(steps, values, color="C0", alpha=0.3 if len(values) > 20 else 1.0, linewidth=1)
    if len(values) > 20:
        window = max(3, len(values) // 25)
        smooth = np.convolve(values, np.ones(window) / window, mode="valid")
        first = (window - 1) // 2  # each mean stands in the middle of its window
        panel.plot(steps[first : first + len(smooth)], smooth, color="C0", linewidth=1.8)
    steps, values = _series(log_history, f"eval_{key}")
    if values:
        panel.plot(steps, values, color="C1", marker="o", markersize=3.5, linewidth=1.8)
    handles = {"training": "C0", **({"held out": "C1"} if values else {})}
    for place, (name, colour) in enumerate(handles.items()):
        panel.text(
            0.97,
            0.95 - 0.1 * place,
            name,
            color=colour,
            transform=panel.transAxes,
            ha="right",
            va="top",
            fontsize=8,
        )
    _tidy(panel)


def _language_colours(log_history: Sequence[Mapping]) -> dict[str, str]:
    """One colour per language for all panels: not every objective has every language."""
    prefixes = tuple(f"eval_accuracy_{objective}_" for objective in OBJECTIVES)
    names = (name for line in log_history for name in line if name.startswith(prefixes))
    languages = dict.fromkeys(name.rpartition("_")[2] for name in names)
    return {language: f"C{place + 2}" for place, language in enumerate(languages)}


def _draw_accuracies(panel, log_history: Sequence[Mapping], key: str, colours: Mapping[str, str]) -> None:
    """All languages in bold, each one thin."""
    for language, colour in colours.items():
        steps, values = _series(log_history, f"{key}_{language}")
        if not values:
            continue
        panel.plot(
            steps,
            values,
            color=colour,
            linewidth=1,
            marker="." if len(values) < 3 else None,
            label=language,
        )
    steps, values = _series(log_history, key)
    panel.plot(steps, values, color="black", linewidth=2, marker="o", markersize=3, label="all")
    if values:
        panel.legend(fontsize=7, frameon=False, ncols=2, loc="best", handlelength=1.2, columnspacing=0.8)
    panel.set_ylim(0, 1.02)
    _tidy(panel)


def _draw_metrics(panel, log_history: Sequence[Mapping], metrics: Sequence[str]) -> None:
    for name in metrics:
        steps, values = _series(log_history, name)
        panel.plot(
            steps, values, marker="o", markersize=3.5, label=name.removeprefix("eval_").replace("_", " ")
        )
    if metrics:
        panel.legend(fontsize=8, frameon=False)
    _tidy(panel)


def recall_curves(
    curves: Mapping[str, Mapping[int, float]],
    path: str | os.PathLike,
    *,
    chance: Mapping[int, float] | None = None,
    title: str = "",
) -> Path:
    """Recall in per cent over k: `curves` is name -> {k: recall}; `chance` is drawn dotted."""
    figure = new_figure(6, 4)
    panel = figure.subplots()
    for name, recalls in curves.items():
        panel.plot(list(recalls), list(recalls.values()), marker="o", label=name)
    if chance:
        panel.plot(list(chance), list(chance.values()), color=GREY, linestyle=":", label="chance")
    panel.set(xlabel="k", ylabel="recall@k in %", ylim=(0, 102), title=title)
    panel.set_xticks(sorted({k for recalls in curves.values() for k in recalls}))
    panel.legend(fontsize=8, frameon=False)
    _tidy(panel)
    return save_figure(figure, path)


# ---- tables and grids ----


def heat_map(
    values,
    row_names: Sequence[str],
    column_names: Sequence[str],
    path: str | os.PathLike,
    *,
    title: str = "",
    label: str = "",
    limits: tuple[float, float] | None = None,
) -> Path:
    """A table of numbers as colours, e.g. settings x languages; a missing value (NaN) stays blank.

    Args:
        values: (rows, columns).
        limits: values of the palest and the darkest colour; without it, the table's own.
    """
    values = np.asarray(values, float)
    if values.shape != (len(row_names), len(column_names)):
        raise ValueError(
            f"values are {values.shape}, but there are {len(row_names)} rows, {len(column_names)} columns"
        )
    low, high = limits or (np.nanmin(values), np.nanmax(values))
    figure = new_figure(2.6 + 0.85 * len(column_names), 1.5 + 0.5 * len(row_names))
    panel = figure.subplots()
    shown = panel.imshow(values, cmap="YlGnBu", vmin=low, vmax=high, aspect="auto")
    panel.set_xticks(range(len(column_names)), column_names)
    panel.set_yticks(range(len(row_names)), row_names)
    panel.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False)
    panel.spines[:].set_visible(False)
    panel.set_xticks(np.arange(len(column_names) + 1) - 0.5, minor=True)
    panel.set_yticks(np.arange(len(row_names) + 1) - 0.5, minor=True)
    panel.grid(which="minor", color="white", linewidth=2)
    panel.tick_params(which="minor", length=0)
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            dark = high > low and (value - low) / (high - low) > 0.6
            panel.text(
                column, row, f"{value:.1f}", ha="center", va="center", color="white" if dark else "0.15"
            )
    panel.set_title(title, fontsize="medium", fontweight="bold")
    figure.colorbar(shown, ax=panel, label=label, shrink=0.9, pad=0.02).outline.set_visible(False)
    return save_figure(figure, path)


def image_grid(
    images: Iterable,
    titles: Sequence[str],
    path: str | os.PathLike,
    *,
    columns: int = 5,
    heading: str = "",
    correct: Sequence[bool] | None = None,
) -> Path:
    """Images side by side in rank order, e.g. the best ten of a search.

    Args:
        images: PIL images or paths.
        titles: one per image.
        correct: frames the images green where true, red where not.
    """
    pictures = [_open(image) for image in images]
    if not pictures or len(titles) != len(pictures):
        raise ValueError(
            f"{len(pictures)} images and {len(titles)} titles; expected at least one, and a title for each"
        )
    columns = min(columns, len(pictures))
    rows = math.ceil(len(pictures) / columns)
    figure = new_figure(2.5 * columns, 2.35 * rows + (0.5 if heading else 0.1))
    panels = figure.subplots(rows, columns, squeeze=False)
    for panel in panels.flat:
        panel.set(xticks=[], yticks=[], anchor="N")  # titles of a row at one height
        panel.spines[:].set_visible(False)
    for place, (panel, picture, title) in enumerate(zip(panels.flat, pictures, titles, strict=False)):
        panel.imshow(picture)
        panel.set_title(title, fontsize=8)
        if correct is not None:
            panel.spines[:].set(visible=True, color="#2ca02c" if correct[place] else "#d62728", linewidth=3)
    if heading:
        figure.suptitle(heading, fontsize=12, fontweight="bold")
    return save_figure(figure, path)


def _open(image) -> Image.Image:
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    with Image.open(image) as opened:
        return opened.convert("RGB")


def _shorten(text: str, limit: int = 60) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"
