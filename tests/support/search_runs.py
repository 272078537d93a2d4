"""Searches over micro runs."""

from pathlib import Path

from evspan.pipeline.metrics_log import read_metrics


def search_words(shards: Path, sweep: Path, *more: str) -> list[str]:
    """Overrides of a search by the loss; a trial has 9 steps and is compared at 3."""
    return [
        "search=optuna",
        "search.metric=loss",
        "search.min_steps=3",
        "search.startup_trials=3",
        "optimizer.lr=tag(log,interval(1e-6,1e-2))",
        f"dataset.root={shards}",
        f"run_dir={sweep}",
        "size=micro",
        "model.head.num_classes=3",
        "augmentation=none",
        "training.engine=plain",
        "deepspeed=zero0",
        "training.batch_size=2",
        "training.sequence_length=4",
        "training.num_workers=0",
        "training.max_steps=9",
        "training.evaluate_every=0",
        "training.log_every=1",
        "training.log_images_every=0",
        "training.ema_decay=0",
        "evaluation.at_end=false",
        "optimizer.schedule=cosine",
        "checkpoint.every=3",
        "parallel.threads=1",
        *more,
    ]


def study_of(sweep: Path):
    """The search's Optuna study, read independently."""
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    storage = JournalStorage(JournalFileBackend(str(sweep / "search.journal")))
    (summary,) = optuna.get_all_study_summaries(storage)
    return optuna.load_study(study_name=summary.study_name, storage=storage)


def train_steps(sweep: Path) -> int:
    """Steps that the runs of a sweep have trained."""
    steps = 0
    for run in sweep.iterdir():
        if run.name.isdigit():
            steps += max((r["step"] for r in read_metrics(run)), default=0)
    return steps
