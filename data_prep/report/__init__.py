"""`evspan prep report`: numbers (survey), what is odd about them (findings), charts (plots), the page, the command."""
