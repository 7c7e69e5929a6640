"""Results as tables that fit a narrow terminal."""

from __future__ import annotations

import io
import shutil
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from trainer.progress import size


def render(title: str, head: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: bool = True) -> list[str]:
    """Lines of a table, numbers (all columns but the first) to the right; as wide as the terminal at most."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for index, name in enumerate(head):
        table.add_column(name, justify="right" if numbers and index else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    text = io.StringIO()
    Console(file=text, width=width(), color_system=None, markup=False, emoji=False, highlight=False).print(table)
    return [line.rstrip() for line in text.getvalue().splitlines()]


def width() -> int:
    """Columns of the terminal that stdout goes to; 100 where there is none."""
    return shutil.get_terminal_size((100, 24)).columns


@dataclass(frozen=True)
class Column:
    """A column of a table. `need`: those of the lowest need go into a narrow terminal first, those of need 0 always."""

    need: int
    head: str
    cells: Sequence[str]
    left: bool = False

    @property
    def room(self) -> int:
        """Terminal columns it takes, with the gap before it."""
        return 2 + max(len(text) for text in (self.head, *self.cells))


def fitted(title: str, columns: Sequence[Column]) -> list[str]:
    """Lines of a table, the first column to the left; columns that do not fit the terminal are left out by need.

    Where those of need 0 alone do not fit, the lines are cut.
    """
    room, chosen = width() + 2, set()
    for index in sorted(range(len(columns)), key=lambda i: columns[i].need):
        if columns[index].need == 0 or columns[index].room <= room:
            chosen.add(index)
            room -= columns[index].room
    kept = [column for index, column in enumerate(columns) if index in chosen]
    lines = textwrap.wrap(title, width())
    for row in zip(*((column.head, *column.cells) for column in kept), strict=True):
        parts = [
            text.ljust(column.room - 2) if column.left or column is kept[0] else text.rjust(column.room - 2)
            for column, text in zip(kept, row, strict=True)
        ]
        lines.append("  ".join(parts).rstrip())
    return [line if len(line) <= width() else f"{line[: width() - 1]}…" for line in lines]


def front_table(result: dict[str, Any]) -> list[str]:
    """The Pareto front of a search, its choice and its gate."""
    fp32 = result["table_bytes_fp32"]
    rows = [
        [
            ("> " if index == result["chosen"] else "  ") + size(point["table_bytes"]),
            f"{point['table_bytes'] / fp32:.1%}",
            f"{point['delta_ne']:+.4%}",
            f"{point['delta_ne_upper']:+.4%}",
            f"{point['delta_auc']:+.5f}",
        ]
        for index, point in enumerate(result["front"])
    ]
    gate = result["gate"]
    lines = render("Pareto front", ["tables", "of fp32", "delta NE", "95% bound", "delta AUC"], rows)
    word = "passed" if gate["passed"] else "NOT passed"
    bound = f"delta NE {gate['delta_ne']:+.4%}, bound {gate['delta_ne_upper']:+.4%}, budget {gate['budget']:.4%}"
    lines.append(f"gate {word} on {gate['rows']:,} rows the search never saw: {bound}")
    if not gate["passed"]:
        need = gate["rows_to_resolve"]
        if gate.get("ms", 0.0) > gate.get("max_ms", gate.get("ms", 0.0)):
            lines.append(f"500 candidates take {gate['ms']:.3g} ms, allowed are {gate['max_ms']:g}: allow more")
        elif need > gate["rows"]:
            lines.append(f"the data cannot resolve this budget: about {need:,} rows would")
        else:
            lines.append(
                "no plan tried holds this budget: allow larger tables (tune.space.budget) or a larger --max-delta-ne"
            )
    lines.append(f"{result['trials']} trials; artifact: {result['artifact']}")
    return lines


def losses_table(by_table: dict[str, dict[str, float]]) -> list[str]:
    """What compressing each table alone costs, as predicted and as measured."""
    rows = [
        [name, f"{1e6 * t['predicted']:,.2f}", f"{1e6 * t['measured']:+,.2f}", f"{1e6 * t['error']:,.2f}"]
        for name, t in sorted(by_table.items(), key=lambda item: -item[1]["predicted"])
    ]
    title = "each table alone: millionths of a nat of log loss"
    return render(title, ["table", "predicted", "measured", "+-"], rows)


def methods_lines(result: dict[str, Any]) -> list[str]:
    """Ways of compressing tables, one a line: size, time of 500 candidates, quality on all rows."""
    fp32 = result["table_bytes_fp32"]
    rows = [
        [
            m["name"],
            f"{m['row_bytes'] / fp32:.2%}",
            f"{m['table_bytes'] / fp32:.2%}",
            "-" if m["milliseconds"] is None else f"{m['milliseconds']:.2f}",
            f"{m['delta_auc']:+.5f}",
            f"{m['delta_ne']:+.3%}",
            f"{m['delta_ne_upper']:+.3%}",
        ]
        for m in result["methods"]
    ]
    title = f"{result['rows']:,} rows of {result['split']}; fp32 rows take {size(fp32)}"
    lines = render(title, ["method", "rows", "with ids", "ms of 500", "delta AUC", "delta NE", "95% bound"], rows)
    return [*lines, "with --out: on rare ids, unknown ones and each task, too"]


def methods_markdown(result: dict[str, Any]) -> str:
    """The same as a Markdown table, with delta NE on each slice of the rows."""
    fp32 = result["table_bytes_fp32"]
    slices = list(dict.fromkeys(name for m in result["methods"] for name in m["slices"]))
    head = ["method", "rows, % of fp32", "with id map", "ms of 500", "delta AUC", "95% bound", "delta NE", "95% bound"]
    lines = [head + [f"delta NE, {name}" for name in slices], ["---"] + ["---:"] * (len(head) + len(slices) - 1)]
    for m in result["methods"]:
        lines.append(
            [
                m["name"],
                f"{m['row_bytes'] / fp32:.2%}",
                f"{m['table_bytes'] / fp32:.2%}",
                "-" if m["milliseconds"] is None else f"{m['milliseconds']:.2f}",
                f"{m['delta_auc']:+.5f}",
                f"{m['delta_auc_lower']:+.5f}",
                f"{m['delta_ne']:+.3%}",
                f"{m['delta_ne_upper']:+.3%}",
                *(f"{m['slices'][name]['delta_ne']:+.3%}" for name in slices),
            ]
        )
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def checkpoint_table(result: dict[str, Any]) -> list[str]:
    """What is inside a checkpoint."""
    rows = [
        [name, f"{t['num_embeddings']:,}", str(t["embedding_dim"]), size(t["bytes"]), str(t["sharding_type"])]
        for name, t in result["tables"].items()
    ]
    lines = render(f"{result['name']}, version {result['version']}", ["table", "rows", "dim", "bytes", "placed"], rows)
    at = result["position"]
    metrics = result["metrics"]
    by_task = {"": metrics} if "ne" in metrics else {f"{task} ": m for task, m in metrics.items()}
    quality = "  ".join(f"{task}NE {m['ne']:.5f} AUC {m['auc']:.5f}" for task, m in by_task.items())
    lines += [
        f"{result['arch']}, {result['dense_parameters']:,} dense parameters ({result['dense_optimizer']}, "
        f"{result['precision']}); tables by {result['table_optimizer']}",
        f"after {at['samples']:,} samples: stage {at['stage']}, epoch {at['epoch']}, batch {at['batch']}; "
        f"written by {result['world_size']} worker(s)",
        f"validation: {quality}",
        f"{size(result['bytes'])} in {len(result['files'])} files, "
        + ("checksums verified" if result["verified"] else "checksums not looked at"),
    ]
    return lines


def ranked_table(result: dict[str, Any]) -> list[str]:
    """An answer: rank, score, title or id."""
    rows = [[str(item.get("title") or item["id"]), str(item["id"]), f"{item['score']:.4f}"] for item in result["items"]]
    lines = render(f"version {result['version']}, {result['ms']:.2f} ms", ["item", "id", "score"], rows)
    if result.get("ignored"):
        lines.append(f"ignored, no feature reads them: {', '.join(result['ignored'])}")
    return lines
