"""A step of `base` that torch has compiled, beside those of part `steps`."""

from gpu.parts import steps


def run(context):
    """Adds the row."""
    if context.on_gpu:
        steps.run_compiled(context)
    else:
        context.report.skipped("compiled", "base", "it is measured on a GPU alone")
