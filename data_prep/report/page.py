"""The report as HTML: one file, no network, light and dark, for the screen and for paper."""

from base64 import b64encode
from collections.abc import Callable, Iterator

from evspan.data_prep.report.figures import (
    classes_section,
    counts_section,
    events_section,
    sizes_section,
)
from evspan.data_prep.report.look import CSS, SCRIPT
from evspan.data_prep.report.markup import (
    cell,
    count,
    decimals,
    percent,
    safe,
    section,
    short,
    span,
    table,
)
from evspan.data_prep.report.plots import sparkline
from evspan.data_prep.report.survey import Summary, Survey

MENDED = ("late_timestamps_raised",)  # events that count among the dropped ones, yet are kept
OPTION = {
    "boxes_between_labelled_frames": "label_every_ms",
    "boxes_off_the_windows": "label_every_ms",
    "boxes_outside_the_sensor": "crop",
    "boxes_under_min_side": "min_side",
    "boxes_under_min_diagonal": "min_diagonal",
    "boxes_over_max_width": "max_width_fraction",
}


def page(survey: Survey, findings: list[str]) -> Iterator[str]:
    """The file's text, part by part."""
    title = f"{survey.root.resolve().name}: dataset report"
    yield (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><title>{safe(title)}</title>\n<style>\n{CSS}</style></head>\n<body>'
    )
    yield _head(survey)
    yield _warnings(findings)
    if survey.recordings:
        for part in (
            _key_figures,
            _splits,
            classes_section,
            sizes_section,
            events_section,
            counts_section,
            _drops,
            _recordings,
            _sheet,
        ):
            yield part(survey)
    yield f"<script>\n{SCRIPT}</script>\n</body></html>\n"


def _head(survey: Survey) -> str:
    manifest, frames = survey.manifest, survey.manifest.config["frames"]
    sizes = sorted({f"{r.entry.width} x {r.entry.height}" for r in survey.recordings})
    told = [
        f"frames of {', '.join(sizes)} pixels" if sizes else "no frames",
        f"mode {frames['mode']}",
        f"{frames['window_ms']} ms in {frames['bins']} bins",
        f"cutoff {frames['cutoff']}",
        f"downsampled by {frames['downsample']}",
        f"{len(manifest.classes)} classes",
    ]
    chosen = f" <small>{safe(survey.chosen)} only</small>" if survey.chosen else ""
    dataset = manifest.config.get("dataset", {}).get("name", "")
    about = " · ".join([dataset, *told] if dataset else told)
    return (
        f"<header><h1>{safe(survey.root.resolve().name)}{chosen}</h1><p>{safe(about)}</p>"
        f"<p class=note>Made by {safe(manifest.software)}, config {safe(manifest.config_hash)}</p></header>\n"
    )


def _warnings(findings: list[str]) -> str:
    if not findings:
        return '<section id="warnings" class="fine"><p>Nothing stands out.</p></section>\n'
    items = "".join(f"<li>{safe(finding)}</li>" for finding in findings)
    title = f"{len(findings)} thing{'s' if len(findings) > 1 else ''} to look at"
    return f'<section id="warnings"><h2>{title}</h2><ul>{items}</ul></section>\n'


def _key_figures(survey: Survey) -> str:
    s = survey.summary()
    figures = [
        (
            "recordings",
            count(len(s.of)),
            f"{span(s.seconds)} in {len(survey.splits)} split{'s' if len(survey.splits) > 1 else ''}",
        ),
        ("frames", count(s.total("frames")), f"{(s.frame_bytes or 0) / 1000:.1f} kB each, stored"),
        (
            "labelled frames",
            count(s.total("labelled_frames")),
            f"{percent(s.labelled_fraction or 0)} of frames, {s.label_rate or 0:.2f} a second",
        ),
        (
            "boxes",
            count(s.total("boxes")),
            f"{s.total('boxes') / max(1, s.total('labelled_frames')):.2f} on a labelled frame",
        ),
        ("events", short(s.total("events")), f"{short(s.event_rate or 0)} a second"),
        (
            "frames without events",
            percent(s.empty_fraction or 0),
            f"{count(sum(r.empty_frames for r in s.of))} frames",
        ),
    ]
    return (
        '<dl class="figures">'
        + "".join(
            f"<div><dt>{name}</dt><dd>{value}</dd><dd class=note>{more}</dd></div>"
            for name, value, more in figures
        )
        + "</dl>\n"
    )


MEASURES: list[tuple[str, Callable[[Summary], float | None], Callable[[float], str]]] = [
    ("seconds", lambda s: s.seconds, decimals(1)),
    ("frames", lambda s: s.total("frames"), count),
    ("labelled", lambda s: s.total("labelled_frames"), count),
    ("share labelled", lambda s: s.labelled_fraction, percent),
    ("labels/s", lambda s: s.label_rate, decimals(2)),
    ("without boxes", lambda s: sum(r.negatives for r in s.of), count),
    ("boxes", lambda s: s.total("boxes"), count),
    ("boxes dropped", lambda s: sum(s.dropped("dropped_boxes").values()), count),
    ("events", lambda s: s.total("events"), short),
    ("events/s", lambda s: s.event_rate, short),
    (
        "events dropped",
        lambda s: sum(n for k, n in s.dropped("dropped_events").items() if k not in MENDED),
        count,
    ),
    ("frames empty", lambda s: s.empty_fraction, percent),
    ("at cutoff", lambda s: s.saturated_fraction, percent),
    ("kB/frame", lambda s: None if s.frame_bytes is None else s.frame_bytes / 1000, decimals(1)),
]


def _measures(summary: Summary) -> str:
    return "".join(cell(value(summary), form) for _, value, form in MEASURES)


def _splits(survey: Survey) -> str:
    rows = [
        f"<tr><th scope=row>{split}</th>{cell(len(survey.summary(split).of))}{_measures(survey.summary(split))}</tr>"
        for split in survey.splits
    ]
    foot = f"<tr><th scope=row>total</th>{cell(len(survey.recordings))}{_measures(survey.summary())}</tr>"
    heads = [("split", False), ("recordings", True), *((name, True) for name, _, _ in MEASURES)]
    return section(
        "Splits",
        "splits",
        table("split-table", heads, rows, foot),
        "Seconds from first to last event. Without boxes: labelled frames that show nothing. At cutoff: of the cells "
        f"that count anything, in {count(sum(r.sampled_frames for r in survey.recordings))} decoded frames.",
    )


def _drops(survey: Survey) -> str:
    summary = survey.summary()
    labels = survey.manifest.config.get("dataset", {}).get("labels", {})
    boxes, events = summary.dropped("dropped_boxes"), summary.dropped("dropped_events")
    box_total = summary.total("boxes") + sum(boxes.values())
    event_total = summary.total("events") + sum(
        n for reason, n in events.items() if reason not in MENDED
    )

    def row(reason: str, number: int, total: int, more: str = "") -> str:
        share = number / total if total else 0
        words = safe(reason.removeprefix("boxes_").replace("_", " ")) + (
            f" <small>{safe(more)}</small>" if more else ""
        )
        bar = f'<div style="width:{100 * min(share, 1):.1f}%"></div>' if number else ""
        return f'<tr><th scope=row>{words}</th>{cell(number)}{cell(share, percent)}<td class="share">{bar}</td></tr>'

    def setting(reason: str) -> str:
        option = OPTION.get(reason)
        return f"{option} = {labels[option]}" if option in labels else ""

    heads = [("", False), ("number", True), ("share", True), ("", False)]
    box_rows = [row("kept", summary.total("boxes"), box_total)]
    box_rows += [
        row(k, n, box_total, setting(k))
        for k, n in sorted(boxes.items(), key=lambda item: -item[1])
    ]
    event_rows = [row("kept", summary.total("events"), event_total)]
    event_rows += [
        row(k, n, event_total, "kept, their time mended" if k in MENDED else "")
        for k, n in sorted(events.items(), key=lambda item: -item[1])
    ]
    tables = (
        f"<div><h3>Boxes</h3>{table('box-drops', heads, box_rows)}</div>"
        f"<div><h3>Events</h3>{table('event-drops', heads, event_rows)}</div>"
    )
    return section("What was left out", "drops", f'<div class="two">{tables}</div>')


def _recordings(survey: Survey) -> str:
    classes = survey.manifest.classes
    rows = []
    for r in survey.recordings:
        peak = float(r.curve.rate.max(initial=0))
        drawn = sparkline(r.curve.rate, f"events per second of {r.key}, up to {short(peak)}")
        rows.append(
            f'<tr><th scope=row>{safe(r.entry.name)}</th><td>{r.entry.split}</td><td data-value="{peak!r}">{drawn}</td>'
            f"{_measures(Summary([r], survey.cutoff))}{''.join(cell(n) for n in r.per_class)}</tr>\n"
        )
    total = survey.summary()
    foot = f"<tr><th scope=row>total</th><td></td><td></td>{_measures(total)}{''.join(cell(n) for n in total.per_class)}</tr>"
    heads = [
        ("recording", False),
        ("split", False),
        ("events over time", True),
        *((name, True) for name, _, _ in MEASURES),
        *((safe(name), True) for name in classes),
    ]
    return section(
        "Recordings",
        "recordings",
        table("recording-table", heads, rows, foot, sortable=True),
        "A click on a column's head sorts by it. The curves are each to its own scale.",
    )


def _sheet(survey: Survey) -> str:
    shown = [r for r in survey.recordings if r.pictures]
    pictures = [p for r in shown for p in r.pictures]
    tiles = "".join(
        f'<figure><img loading="lazy" alt="{safe(p.about)}" src="data:image/png;base64,{b64encode(p.png).decode()}">'
        f"<figcaption>{safe(p.about)}</figcaption></figure>"
        for p in pictures
    )
    return section(
        "Frames",
        "frames",
        f'<div class="sheet">{tiles}</div>',
        f"{len(pictures)} frames of {len(shown)} recordings, those with boxes where there are any. "
        "More brightness is blue, less is red, both is violet. A click enlarges.",
    )
