"""What `slimrank artifact` prints for people: lines that fit a narrow terminal."""

from __future__ import annotations

from typing import Any

from cluster.tables import render
from compress.manifest import printable
from trainer.progress import size


def show_lines(result: dict[str, Any]) -> list[str]:
    """Tables, sizes, lineage and metrics of an artifact."""
    rows = [
        [
            t["name"],
            "/".join(map(str, t["bits"])),
            "/".join(f"{rows:,}" for rows in t["rows"]),
            shown_dim(t),
            size(t["bytes"]),
        ]
        for t in result["tables"]
    ]
    lines = render(f"{result['name']}, version {result['version']}", ["table", "bits", "rows", "dim", "bytes"], rows)
    sizes = result["sizes"]
    share = sizes["table_bytes"] / max(sizes["table_bytes_fp32"], 1)
    lines += [
        f"tables {size(sizes['table_bytes'])} of {size(sizes['table_bytes_fp32'])} in fp32 ({share:.2%}), "
        f"whole artifact {size(sizes['artifact_bytes'])}",
        "files: " + ", ".join(f"{name} {size(count)}" for name, count in result["files"].items()),
        "lineage: " + pairs(result["lineage"]),
        "metrics: " + pairs(result["metrics"]),
        f"signature: {result['signature'] or 'none'}; {'encrypted' if result['encrypted'] else 'not encrypted'}",
    ]
    return lines


def shown_dim(table: dict[str, Any]) -> str:
    """A table's dim, the width of its rows where that is less, and whether the head takes its decoder's place."""
    if table["folded_from"] is not None:
        return printable(f"{table['width']} of {table['folded_from']}, folded")
    return str(table["dim"]) if table["width"] == table["dim"] else f"{table['width']} of {table['dim']}"


def pairs(values: dict[str, Any]) -> str:
    """Keys and values side by side; what holds more than a number or a word is counted."""
    words = [
        f"{k} {v:.6g}" if isinstance(v, float) else f"{k} ({len(v)})" if isinstance(v, dict | list) else f"{k} {v}"
        for k, v in values.items()
    ]
    return printable(", ".join(words)) or "none"


def verify_lines(result: dict[str, Any]) -> list[str]:
    """What was checked of an artifact."""
    signed = "unsigned" if result["signature"] is None else f"signed by {result['signature']}"
    if result["signature"] is not None:
        signed += ", checked" if result["signature_checked"] else ", NOT checked: no trusted key is configured"
    lines = [
        f"{result['version']}: whole; {result['files']} files, {size(result['bytes'])}, every checksum right",
        f"{result['golden_rows']} golden rows score as written (largest difference {result['golden_distance']:.1g}, "
        f"allowed {result['golden_tolerance']:g})",
        signed + ("; encrypted" if result["encrypted"] else ""),
    ]
    if result["ignored_files"]:
        lines.append(f"not of the artifact, never read: {', '.join(result['ignored_files'])}")
    return lines


def diff_lines(result: dict[str, Any]) -> list[str]:
    """What changed between two artifacts."""
    if result["same"]:
        return [f"the same artifact: {result['versions'][0]}"]
    rows = [[printable(key), value(before), value(after)] for key, (before, after) in result["changes"].items()]
    return render(f"{result['versions'][0]} -> {result['versions'][1]}", ["what", "before", "after"], rows)


def value(found: Any) -> str:
    """One value of a manifest as text."""
    if isinstance(found, float):
        return f"{found:.6g}"
    if isinstance(found, int) and not isinstance(found, bool):
        return f"{found:,}"
    return "-" if found is None else printable(str(found))
