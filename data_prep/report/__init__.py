"""`evspan prep report`: numbers (survey), warnings (findings), SVG charts, the page."""
