"""Where results go: a Markdown table, line by line as they come, and JSON lines."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]
Columns = Mapping[str, str]
"""Names of a row's figures, in the table's order, and how they are formatted."""


def say(text: str) -> None:
    """Print a line at once: a run may be cut off."""
    print(text, flush=True)


def progress(text: str) -> None:
    """A line that is no part of a table."""
    say(f"# {text}")


def about(device: torch.device) -> Row:
    """What a run's figures depend on."""
    import transformers

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": name,
        "argv": sys.argv[1:],
        "time": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


class Recorder:
    """Appends JSON lines to ``folder/part.jsonl``, each written at once; nothing without a folder."""

    def __init__(self, folder: Path | None, part: str) -> None:
        self.path = folder / f"{part}.jsonl" if folder is not None else None
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def write(self, kind: str, row: Row) -> None:
        """One line: ``{"kind": kind, ...}``. Kinds are "about", "row" and "summary"."""
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps({"kind": kind, **row}) + "\n")


def read_rows(paths: Iterable[Path], part: str) -> list[Row]:
    """The rows of a part, from files or folders of JSON lines.

    Of rows with the same case and variant the last counts. What a run that was cut off left of a line does not.
    """
    rows: dict[tuple[str, str], Row] = {}
    files = [path / f"{part}.jsonl" if path.is_dir() else path for path in paths]
    for file in files:
        for line in file.read_text().splitlines() if file.exists() else ():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            if row["kind"] == "row" and row["part"] == part:
                rows[row["case"], row["variant"]] = row
    return list(rows.values())


def header(columns: Columns) -> str:
    names = ["case", "variant", *columns, "notes"]
    return f"| {' | '.join(names)} |\n|{' --- |' * len(names)}"


def line(row: Row, columns: Columns) -> str:
    """A row of the table. A ``*`` marks a compilation out of inductor's cache."""
    shown = [format(row[key], style) if row.get(key) is not None else "" for key, style in columns.items()]
    if "compile_s" in columns and row.get("cache_hit"):
        shown[list(columns).index("compile_s")] += "*"
    return "| " + " | ".join([row["case"], row["variant"], *shown, "; ".join(notes(row))]) + " |"


def notes(row: Row) -> list[str]:
    """What else there is to say: what became of the loops, what failed, and why something is missing."""
    found = [f"{count} {name}" for name, count in (row.get("loops") or {}).items()]
    if row.get("cudagraph_skips"):
        found.append(f"{row['cudagraph_skips']} graphs not captured")
    found += [f"{label}{row[key]}" for key, label in _TEXTS.items() if row.get(key)]
    return [note.replace("|", "\\|") for note in found]


_TEXTS = {"left_out": "left out: ", "error": "", "replay_error": "not captured: "}


def short(row: Row) -> str:
    """A row in a few words, for a progress line."""
    return f"{row['ms']:.4f} ms, compiled in {row['compile_s']:.1f} s" if "ms" in row else "; ".join(notes(row))


def table(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first row is its head."""
    head, *rest = ["| " + " | ".join(cells) + " |" for cells in rows]
    return "\n".join([head, "|" + " --- |" * len(rows[0]), *rest])


def reason(error: BaseException) -> str:
    """One line of an error: ours for a loop that was left as it is, else its first."""
    lines = [text.strip() for text in str(error).splitlines() if text.strip()]
    ours = [text for text in lines if "leaves this loop as it is:" in text or "left as it is:" in text]
    text = ours[0].partition("as it is:")[2].strip() if ours else next(iter(lines), "")
    return f"{type(error).__name__}: {text}"[:300]


def guarded(action: Callable[[], Row]) -> Row:
    """What ``action`` returns, or the reason why it raised: one variant that fails does not end a run."""
    try:
        return action()
    except Exception as error:
        return {"error": reason(error)}
