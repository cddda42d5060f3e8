"""Prompt folders for the rows of the trade-off.

python -m tests.benchmarks.prompt_sets SPLITS OUT

SPLITS holds `harmful_train.json`, `harmful_val.json`, `harmless_train.json` and `harmless_val.json`, lists of `instruction`,
as in the data of github.com/andyrdt/refusal_direction (Apache-2.0), which is no part of this project.

`OUT/development` has the bundled prompts and one split more, `development`: what recipes are chosen on. It is the bundled
selection split, 100 public prompts of either kind, and the borderline training prompts from `HELD_BACK` on, which the
rows must not train on (`prompts.contrast = 264`).

`OUT/public` has public prompts wherever there are any: direction, selection and training split and the first of the harmless
test prompts from the training files, the harmful test prompts from the validation file. All others are the bundled ones.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import get_args

from safesteer_lite.prompts.sets import Kind, data_files

HELD_BACK = 264
PUBLIC = 100
SIZES = {"direction": 128, "selection": 32, "train": 100}

Line = dict[str, str]


def bundled() -> dict[str, list[Line]]:
    """Every bundled prompt, by kind."""
    return {
        path.stem: [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] for path in data_files()
    }


def public(folder: Path, kind: str, part: str) -> list[str]:
    """The instructions of one public file."""
    rows = json.loads((folder / f"{kind}_{part}.json").read_text(encoding="utf-8"))
    return [row["instruction"] for row in rows]


def lines(split: str, name: str, texts: list[str]) -> list[Line]:
    """Prompts as the lines of a prompt file."""
    return [{"id": f"{name}-{place:03}", "split": split, "prompt": text} for place, text in enumerate(texts, 1)]


def development(folder: Path) -> dict[str, list[Line]]:
    """The bundled prompts and a split to choose recipes on."""
    sets = bundled()
    for kind, known in sets.items():
        held = [line["prompt"] for line in known if line["split"] == "selection"]
        if kind == "borderline":
            held += [line["prompt"] for line in known if line["split"] == "train"][HELD_BACK:]
        elif kind in ("harmful", "harmless"):
            held += public(folder, kind, "train")[:PUBLIC]
        if kind != "twin":
            known += lines("development", f"{kind}-development", held)
    return sets


def all_public(folder: Path) -> dict[str, list[Line]]:
    """Public harmful and harmless prompts of the sizes of the bundled ones; all others are the bundled ones."""
    sets = bundled()
    for kind in ("harmful", "harmless"):
        texts = public(folder, kind, "train")
        sets[kind], start = [], 0
        for split, size in SIZES.items():
            sets[kind] += lines(split, f"public-{kind}-{split}", texts[start : start + size])
            start += size
        sets[kind] += lines("test", f"public-{kind}-test", public(folder, kind, "val")[:PUBLIC])
    return sets


def write(sets: dict[str, list[Line]], folder: Path) -> None:
    """One JSON Lines file a kind."""
    folder.mkdir(parents=True, exist_ok=True)
    for kind in get_args(Kind):
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in sets[kind])
        (folder / f"{kind}.jsonl").write_text(text, encoding="utf-8")


def main() -> None:
    """Write both folders."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("splits", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    write(development(options.splits), options.out / "development")
    write(all_public(options.splits), options.out / "public")


if __name__ == "__main__":
    main()
