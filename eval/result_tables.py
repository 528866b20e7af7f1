# Copyright 2026 The LIFT and PLACE distillation authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""The tables of evaluate.py and report.py, each with at most six columns.

`tables_from_files` makes the report's tables again from its JSON and from that of evaluate.py.
"""

import json
from pathlib import Path
from typing import Any


COLUMNS = {  # title, format and factor of each result
    "images": ("images", ",", 1),
    "fid": ("FID", ".2f", 1),
    "kid": ("KID · 10³", ".4g", 1000),
    "inception_score": ("IS", ".2f", 1),
    "precision": ("precision", ".3f", 1),
    "recall": ("recall", ".3f", 1),
    "fd_dinov2": ("FD-DINOv2", ".2f", 1),
    "cmmd": ("CMMD", ".4f", 1),
    "clip_score": ("CLIP", ".4f", 1),
    "pickscore": ("PickScore", ".3f", 1),
    "sampler": ("sampler", "", 1),
    "num_inference_steps": ("steps", "", 1),
    "guidance_scale": ("guidance", "", 1),
    "seed": ("seed", "", 1),
    "dtype": ("dtype", "", 1),
}
# Keys of evaluate.py for the table of all quality figures, besides the distances.
QUALITY = ("images", "inception_score", "precision", "recall", "clip_score")
OTHER_NETWORKS = ("fd_dinov2", "cmmd", "pickscore")  # for a table of their own
INCEPTION_NAME = "Inception (clean-fid)"  # of the extractor
# Quality in words: a distance, divided by the one it is compared with, is at most this.
WORDS = {
    0.9: "better than",
    1.1: "close to",
    1.5: "slightly worse than",
    3.0: "worse than",
    float("inf"): "much worse than",
}


def title_of(key: str, inception: bool) -> str:
    """A column's title. Only features by Inception give an FID, a KID and an Inception score."""
    others = {"fid": "Fréchet distance", "kid": "kernel distance · 10³", "inception_score": "score"}
    return COLUMNS[key][0] if inception else others.get(key, COLUMNS[key][0])


def is_inception(results: dict) -> bool:
    """Whether FID and its like, if they were measured, are in Inception's features."""
    return results["extractor"] is None or results["extractor"]["name"] == INCEPTION_NAME


def make_table(rows: dict[str, dict], keys: tuple[str, ...], inception: bool, head: str = "") -> list[list[str]]:
    """The cells of a table.

    Args:
        rows: Results by the name in the first column.
        keys: Of [`COLUMNS`]. Those without a value in any row get no column.
        inception: Whether the features are Inception's.
        head: Title of the first column.

    Returns:
        The head and a list of cells per row; empty if no key has a value.
    """
    shown = [key for key in keys if any(row.get(key) is not None for row in rows.values())]
    if not shown:
        return []
    cells = [[name, *(format_cell(key, row.get(key)) for key in shown)] for name, row in rows.items()]
    return [[head, *(title_of(key, inception) for key in shown)], *cells]


def format_cell(key: str, value: Any) -> str:
    """A result as its column shows it."""
    _, style, factor = COLUMNS[key]
    return "–" if value is None else f"{value * factor if style else value:{style}}"


def list_figures(rows: dict[str, dict], metrics: list[str], inception: bool) -> list[list[str]]:
    """The cells of a table with a row for each metric and set of images: value, numbers of samples, and warning.

    Args:
        rows: Results of evaluate.py by name.
        metrics: Of [`COLUMNS`], in the order of the table.
        inception: Whether the features are Inception's.
    """
    cells = []
    for metric in metrics:
        for name, row in rows.items():
            samples = ["–" if count is None else f"{count:,}" for count in row["samples"][metric]]
            value, warning = format_cell(metric, row[metric]), row["warnings"].get(metric, "")
            cells.append([title_of(metric, inception), name, value, *samples, warning])
    return [["metric", "images", "value", "samples", "reference", "warning"], *cells]


def as_markdown(table: list[list[str]], words: tuple[int, ...] = (0,)) -> str:
    """A table in Markdown. The columns of words are aligned to the left, the others to the right."""
    lines = [f"| {' | '.join(row)} |" for row in table]
    rule = "".join("---|" if column in words else "--:|" for column in range(len(table[0])))
    return "\n".join([lines[0], f"|{rule}", *lines[1:]])


def list_remarks(rows: dict[str, dict]) -> list[str]:
    """Each remark once, after the names of its rows."""
    names: dict[str, list[str]] = {}
    for name, row in rows.items():
        for remark in row["remarks"]:
            names.setdefault(remark, []).append(name)
    return [f"{', '.join(names_of_remark)}: {remark}." for remark, names_of_remark in names.items()]


def quality_in_words(distance: float, other_distance: float, other: str) -> str:
    """Compare two distances to the reference in words, e.g. "close to the teacher", by the rule of [`WORDS`].

    Args:
        distance: Of the images that are judged.
        other_distance: Of the images that they are compared with.
        other: What the others are called.
    """
    if other_distance <= 0:  # kernel distances near 0 may be negative; their ratio means nothing
        return "–"
    ratio = distance / other_distance
    return f"{next(word for limit, word in WORDS.items() if ratio <= limit)} {other}"


def judge(facts: dict[str, dict], rows: dict[str, dict]) -> tuple[dict[str, str], list[str]]:
    """The quality of each model in words, and the rule as a remark.

    A student is compared with the teacher. The teacher is compared with the real images, i.e. the images without a
    model that have the smallest distance. Fréchet distances are compared, or kernel distances where a model has none.

    Args:
        facts: By model, as for [`make_tables`].
        rows: Results of evaluate.py by name, as for [`make_tables`].
    """
    models = [row for name, row in rows.items() if name in facts]
    keys = [key for key in ("fid", "kid") if models and all(row.get(key) is not None for row in models)]
    if "teacher" not in rows or not keys:
        return {}, []
    key = keys[0]
    real = {name: row[key] for name, row in rows.items() if name not in facts and row.get(key) is not None}
    words = {}
    for name in facts:
        if name in rows and name != "teacher":
            words[name] = quality_in_words(rows[name][key], rows["teacher"][key], "the teacher")
    rule = f"a student's {'Fréchet' if key == 'fid' else 'kernel'} distance divided by the teacher's"
    if real:
        best = min(real, key=real.get)
        words["teacher"] = quality_in_words(rows["teacher"][key], real[best], "real images")
        rule += f", and the teacher's divided by that of real images (the row {best})"
    limits = "; ".join(f"up to {limit}: {word}" for limit, word in WORDS.items() if limit < float("inf"))
    return words, [f"Quality in words: {rule}. {limits.capitalize()}; above: {WORDS[float('inf')]}."]


def short_count(count: int) -> str:
    """A number of parameters with three digits, e.g. 866M."""
    for unit, factor in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= 0.9995 * factor:
            return f"{count / factor:.3g}{unit}"
    return str(count)


def make_tables(facts: dict[str, dict], rows: dict[str, dict], inception: bool) -> list[list[list[str]]]:
    """The tables of the report: size, speed and quality in one; all quality figures; all costs; other figures.

    Args:
        facts: "parameters", "macs", "seconds" and "bytes" of each model, the teacher first.
        rows: Results of evaluate.py by name. Images without a model come first.
        inception: Whether the features are Inception's.

    Returns:
        Three or four tables, of a head and a list of cells per row. Columns without a value are dropped; the second
        table is empty without results.
    """
    teacher, words = facts["teacher"], judge(facts, rows)[0]
    keys = [key for key in ("fid", "kid") if any(row.get(key) is not None for row in rows.values())]
    head = ["model", "size (share of the teacher)", "time per image (speed-up)"]
    summary = [head + [title_of(key, inception) for key in keys] + (["quality"] if words else [])]
    costs = [["model", "parameters", "GMACs per pass", "time per image", "peak memory"]]
    for name in [*(name for name in rows if name not in facts), *facts]:
        cells = [name, "–", "–"]
        if name in facts:
            fact = facts[name]
            cells[1] = f"{short_count(fact['parameters'])} ({fact['parameters'] / teacher['parameters']:.1%})"
            cells[2] = f"{fact['seconds']:.3g} s ({teacher['seconds'] / fact['seconds']:.1f}×)"
            figures = [f"{fact['parameters']:,}", f"{fact['macs'] / 1e9:.4g}", f"{fact['seconds']:.3g} s"]
            costs.append([name, *figures, f"{fact['bytes'] / 2**20:,.0f} MiB"])
        cells += [format_cell(key, rows.get(name, {}).get(key)) for key in keys]
        summary.append(cells + ([words.get(name, "–")] if words else []))
    others = make_table(rows, OTHER_NETWORKS, inception, head="model")
    return [summary, make_table(rows, QUALITY, inception, head="model"), costs, *([others] if others else [])]


def tables_from_files(report: Path, results: Path) -> list[list[list[str]]]:
    """[`make_tables`] from a report.json and a JSON of evaluate.py, whose rows must have the models' names.

    Rows of other models are left out.
    """
    facts, measured = json.loads(report.read_text())["facts"], json.loads(results.read_text())
    rows = {row["name"]: row for row in measured["rows"] if row["contents"] is None or row["name"] in facts}
    return make_tables(facts, rows, is_inception(measured))
