"""Pages that need nothing but themselves, in one style: page.html.j2 has it, and the other templates extend that."""

import base64
import io

import jinja2
from PIL import Image

from pipeline.idx import Pixels
from pipeline.promotion import shown_p


def render_page(template: str, **values: object) -> str:
    """A template of this package, filled in. The same values give the same text; all is escaped that is no Markup."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pipeline", "."), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["percent"] = lambda value, digits=1: f"{100 * value:.{digits}f}\N{NO-BREAK SPACE}%"
    environment.filters["p"] = shown_p
    return environment.get_template(template).render(**values)


def png_uri(pixels: Pixels) -> str:
    """A grey image uint8 (height, width) as a PNG data URI."""
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, format="PNG")
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
