"""Convert an example script with `# %%` cells to a Markdown page."""

import ast
import re


def page_of(source: str, name: str) -> str:
    """Return the page of a script: its docstring, then each cell, `# %% [markdown]` as prose and others as code."""
    docstring = ast.get_docstring(ast.parse(source)) or ""
    body = source.split('"""', 2)[2] if docstring else source
    title, _, rest = docstring.partition("\n")
    parts = [f"# {title.rstrip('.')}", rest.strip(), f"The source is `examples/{name}`; run it with `python examples/{name}`."]
    for cell in re.split(r"^# %%", body, flags=re.MULTILINE):
        head, _, text = cell.partition("\n")
        if "[markdown]" in head:
            parts.append("\n".join(re.sub(r"^# ?", "", line) for line in text.strip().splitlines()))
        elif text.strip():
            caption = head.strip()
            parts += [f"## {caption}"] if caption else []
            parts.append(f"```python\n{text.strip()}\n```")
    return "\n\n".join(part for part in parts if part) + "\n"
