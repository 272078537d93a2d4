"""The style sheet and the script of the report pages, for pages that are not templates yet."""

from evspan.data_prep.report.templating import TEMPLATES

CSS = (TEMPLATES / "style.css").read_text(encoding="utf-8")
SCRIPT = (TEMPLATES / "script.js").read_text(encoding="utf-8")
