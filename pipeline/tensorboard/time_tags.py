"""Tags of the scalars on the time of a run."""

GOODPUT = "time/goodput"
QUEUE_HOURS = "time/queue_hours"
RANK_HOURS = "time/rank_hours"


def tag_of_group(name: str) -> str:
    """'data wait' -> 'time/data_wait'."""
    return "time/" + name.replace(" ", "_").replace("-", "_")
