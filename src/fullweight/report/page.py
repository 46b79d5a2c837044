"""Pages of one file that need no network: pictures are inside, and one style is shared by all.

A package keeps its templates in a folder of its own; each extends `page.html`, which is here.
"""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import jinja2
import markupsafe
import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.figure import Figure

_TEMPLATES = Path(__file__).parent / "templates"


def png(figure: Figure) -> bytes:
    """The picture; the figure is closed."""
    buffer = io.BytesIO()
    figure.tight_layout()
    figure.savefig(buffer, format="png", dpi=120)
    pyplot.close(figure)
    return buffer.getvalue()


def inside(picture: bytes) -> str:
    """What an image's address is in a page that holds the picture itself."""
    return f"data:image/png;base64,{base64.b64encode(picture).decode()}"


def escaped(text: str) -> str:
    """Text that may stand in a page whatever it holds."""
    return str(markupsafe.escape(text))


def write_page(path: Path, template: Path, **values: Any) -> None:
    """Write the page beside its final name, then give it that; a value that the template lacks is an error."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([template.parent, _TEMPLATES]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(environment.get_template(template.name).render(**values), encoding="utf-8")
    temporary.replace(path)
