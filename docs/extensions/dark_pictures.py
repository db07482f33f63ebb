"""Pictures for both colour schemes.

A page shows ``name.png`` as usual. If ``name_dark.png`` exists beside it, the site shows that file in the dark scheme.
A picture that a tutorial draws is an SVG whose lines and letters have the colour ``INK`` (tutorials/matplotlibrc); in
its dark copy, another colour replaces ``INK``.
"""

from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform

INK, DARK_INK = "#14161a", "#e6e8ec"


class DarkPictures(SphinxTransform):
    """Adds the dark picture after the light one, each with the class by which the theme shows or hides it."""

    default_priority = 1  # before Sphinx collects pictures

    def apply(self) -> None:
        """Change the document."""
        for image in list(self.document.findall(nodes.image)):
            if not image.get("alt"):
                raise ValueError(f"{self.env.docname}: the picture {image['uri']} must have a text that describes it")
            relative, absolute = self.env.relfn2path(image["uri"], self.env.docname)
            light = Path(absolute)
            dark = light.with_stem(f"{light.stem}_dark")
            if light.suffix == ".svg" and INK in (drawing := light.read_text("utf-8")):
                dark.write_text(drawing.replace(INK, DARK_INK), "utf-8")
            if not dark.exists():
                continue
            twin = image.deepcopy()
            twin["uri"] = image["uri"].replace(Path(relative).name, dark.name)
            image["classes"].append("only-light")
            twin["classes"].append("only-dark")
            image.parent.insert(image.parent.index(image) + 1, twin)


def setup(app: Sphinx) -> dict[str, bool]:
    """Registers the transformation."""
    app.add_transform(DarkPictures)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
