"""Pages and pictures that are made from a template: no script, nothing from elsewhere."""

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from jinja2 import Template

CONTENT_POLICY: Final = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
PAGES: Final = Path(__file__).parent.parent / "pages"


@cache
def template(name: str) -> "Template":
    """A file of `app/pages`; whatever is put into it is escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    pages = Environment(
        loader=FileSystemLoader(PAGES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pages.filters["share"] = share
    return pages.get_template(name)


def share(value: float) -> str:
    """A share as people read it, with as many digits as say something."""
    return f"{100 * value:.1f} %" if value < 0.995 or value == 1 else f"{100 * value:.2f} %"
