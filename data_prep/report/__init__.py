"""`evspan prep report`: numbers (survey), warnings (findings), SVG charts (plots, charts), the page."""
