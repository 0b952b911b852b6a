"""Write what the documentation repeats from the code: the settings, the dashboard, the tree.

python docs/generate.py          writes docs/settings.md, docs/grafana.json, the tree in README.md
python docs/generate.py --check  exits with 1 where one of them is out of date
"""

import ast
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
PACKAGES = ("models", "training", "app", "benchmarks", "docs")
BEGIN, END = "<!-- tree: begin -->", "<!-- tree: end -->"


def settings_page() -> str:
    """`docs/settings.md`, one row a setting."""
    from app.flags import flag_of, is_secret, variable_of
    from app.settings import Settings

    rows = [
        "# Settings",
        "",
        "Flags of `pytorchlib serve` win over environment variables, and these over a line in"
        " `.env`. Lists are separated by commas. Written by `make docs` from `app/settings.py`.",
        "",
        "| flag | variable | default | meaning |",
        "| --- | --- | --- | --- |",
    ]
    for name, field in Settings.model_fields.items():
        default = ",".join(field.default) if isinstance(field.default, tuple) else field.default
        shown = f"`{default}`" if default not in ("", None) else "none"
        flag = "none" if is_secret(field) else f"`{flag_of(name)}`"
        rows.append(f"| {flag} | `{variable_of(name)}` | {shown} | {field.description} |")
    return "\n".join(rows) + "\n"


def tree() -> str:
    """Every module with the first sentence of its docstring."""
    lines = ["```"]
    for package in PACKAGES:
        lines.append(f"{package}/")
        for path in sorted((ROOT / package).rglob("*.py")):
            if path.name == "__init__.py":
                continue
            name = str(path.relative_to(ROOT / package))
            lines.append(f"  {name:<28} {first_sentence(path)}")
    return "\n".join([*lines, "```"])


def first_sentence(path: Path) -> str:
    """Of the module's docstring, on one line, without its full stop."""
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    return " ".join(text.split("\n\n")[0].split()).partition(". ")[0].removesuffix(".")


def pages() -> dict[Path, str]:
    """Every file that is written here, with what it should hold."""
    from docs.grafana import dashboard

    readme = ROOT / "README.md"
    text = readme.read_text()
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    return {
        ROOT / "docs" / "settings.md": settings_page(),
        ROOT / "docs" / "grafana.json": json.dumps(dashboard(), indent=1) + "\n",
        readme: f"{before}{BEGIN}\n{tree()}\n{END}{after}",
    }


def main() -> int:
    """Write or check; the exit code."""
    stale = [
        path for path, text in pages().items() if not path.exists() or path.read_text() != text
    ]
    if "--check" in sys.argv:
        for path in stale:
            sys.stderr.write(f"{path.relative_to(ROOT)} is out of date: run `make docs`\n")
        return 1 if stale else 0
    for path in stale:
        path.write_text(pages()[path])
    return 0


if __name__ == "__main__":
    sys.exit(main())
