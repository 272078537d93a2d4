"""The sections of the page with charts."""

from itertools import pairwise

import numpy as np
from evspan.data_prep.report.markup import cell, count, percent, safe, section, short, span, table
from evspan.data_prep.report.plots import (
    band_over_time,
    grouped_bars,
    histogram,
    over_time,
    round_ticks,
)
from evspan.data_prep.report.survey import SIDE_EDGES, RecordingStats, Survey, evenly

CHARTS = 12  # recordings that get a chart of their own; --recording shows any


def classes_section(survey: Survey) -> str:
    classes, summaries = survey.manifest.classes, {s: survey.summary(s) for s in survey.splits}
    everything = survey.summary().per_class
    sizes = np.sum([r.per_size for r in survey.recordings], axis=0)
    rows = []
    for k, name in enumerate(classes):
        per_split = "".join(cell(s.per_class[k]) for s in summaries.values())
        rows.append(
            f"<tr><th scope=row>{safe(name)}</th>{per_split}{cell(everything[k])}"
            f"{cell(everything[k] / max(1, everything.sum()), percent)}{''.join(cell(n) for n in sizes[k])}</tr>"
        )
    foot = (
        f"<tr><th scope=row>total</th>{''.join(cell(s.per_class.sum()) for s in summaries.values())}{cell(everything.sum())}"
        f"{cell(1.0 if everything.sum() else None, percent)}{''.join(cell(n) for n in sizes.sum(0))}</tr>"
    )
    heads = [
        ("class", False),
        *((name, True) for name in (*summaries, "boxes", "share", "small", "medium", "large")),
    ]
    numbers = table("class-table", heads, rows, foot)
    if not everything.sum():
        return section("Classes", "classes", numbers, "There are no boxes.")
    shares = [
        (f"bar {s}", (100 * v.per_class / max(1, v.per_class.sum())).tolist())
        for s, v in summaries.items()
    ]
    tips = [
        [
            f"{split}, {name}: {count(v.per_class[k])} boxes, {percent(v.per_class[k] / max(1, v.per_class.sum()))}"
            for k, name in enumerate(classes)
        ]
        for split, v in summaries.items()
    ]
    legend = "".join(f'<span class="key {s}">{s}</span>' for s in summaries)
    chart = grouped_bars(
        classes, shares, tips, name="classes by split", x_label="share of the split's boxes, %"
    )
    chart = f"<figure>{chart}<figcaption>{legend}</figcaption></figure>"
    return section(
        "Classes",
        "classes",
        f'<div class="two">{chart}{numbers}</div>',
        "Small, medium and large as COCO has them, in pixels of the stored frames: area below 32², below 96², above.",
    )


def sizes_section(survey: Survey) -> str:
    sides = np.sum([r.per_side for r in survey.recordings], axis=0)
    held = np.flatnonzero(sides)
    if not held.size:
        return ""
    first, last = (
        min(int(held[0]), 16),
        max(int(held[-1]), 28),
    )  # 16 to 128 pixels at least, so that both marks are there
    values, edges = sides[first : last + 1].tolist(), np.log2(SIDE_EDGES[first : last + 2]).tolist()
    tips = [
        f"{2**a:.3g} to {2**b:.3g} pixels: {count(v)} boxes"
        for (a, b), v in zip(pairwise(edges), values, strict=True)
    ]
    ticks = [(float(e), f"{2**e:g}") for e in range(int(np.ceil(edges[0])), int(edges[-1]) + 1)]
    chart = histogram(
        edges,
        values,
        tips,
        name="boxes by size",
        x_label="square root of the area, pixels of the stored frames",
        y_label="boxes",
        x_ticks=ticks,
        marks=[(5.0, "medium from 32²"), (float(np.log2(96)), "large from 96²")],
    )
    return section("Box sizes", "sizes", f"<figure>{chart}</figure>")


def events_section(survey: Survey) -> str:
    recordings = survey.recordings
    shown = [recordings[i] for i in evenly(np.arange(len(recordings)), CHARTS).tolist()]
    top = max((float(r.curve.rate.max(initial=0)) for r in shown), default=0)
    charts = "".join(
        f"<figure>{_over_time(r, top)}<figcaption>{safe(r.key)}: {short(r.entry.events)} events, "
        f"{span(r.seconds)}</figcaption></figure>"
        for r in shown
        if r.curve.events.size
    )
    sampled = count(sum(r.sampled_frames for r in recordings))
    note = (
        "Averaged over neighbouring frames. A recording's number of events is exact; it is spread over its frames by what "
        f"they count after saturation, read off their size and {sampled} decoded frames. The strip below a curve: labelled "
        "frames."
    )
    if survey.manifest.config["frames"]["mode"] == "rvt":
        note += " Frames end with the last label; the events after it are left out, by their share of the time."
    if len(recordings) > CHARTS:
        note += f" {CHARTS} of {len(recordings)} recordings are shown, evenly spread; --recording shows any."
    return section(
        "Events over time", "events", f'{_in_total(survey)}<div class="charts">{charts}</div>', note
    )


def _over_time(r: RecordingStats, top: float) -> str:
    c = r.curve
    columns = (
        column.tolist() for column in (c.edges_s[:-1], c.edges_s[1:], c.rate, c.labelled, c.frames)
    )
    tips = [
        f"{a:.2f} to {b:.2f} s: {short(v)} events/s, {n} of {of} frames labelled"
        for a, b, v, n, of in zip(*columns, strict=True)
    ]
    return over_time(
        c.edges_s,
        c.rate,
        c.labelled / c.frames,
        tips,
        name=f"events per second of {r.key}",
        y_max=top,
    )


def _in_total(survey: Survey) -> str:
    """All recordings over each other: the middle one and the middle 80 % at every time."""
    curves = [r.curve for r in survey.recordings if r.curve.events.size]
    if len(curves) < 3:
        return ""
    times = (np.arange(120) + 0.5) * max(float(c.edges_s[-1]) for c in curves) / 120
    rates = np.full((len(curves), times.size), np.nan)
    for row, c in zip(rates, curves, strict=True):
        at = np.searchsorted(c.edges_s, times, side="right") - 1
        lasts = (at >= 0) & (at < c.events.size)
        row[lasts] = c.rate[at[lasts]]
    there = ~np.isnan(rates).all(0)
    times, rates = times[there], rates[:, there]
    low, middle, high = np.nanquantile(rates, (0.1, 0.5, 0.9), axis=0)
    tips = [
        f"{t:.2f} s: {short(m)} events/s in the middle recording of {n}, 80 % of them between {short(a)} and {short(b)}"
        for t, a, m, b, n in zip(
            times.tolist(),
            low.tolist(),
            middle.tolist(),
            high.tolist(),
            (~np.isnan(rates)).sum(0).tolist(),
            strict=True,
        )
    ]
    chart = band_over_time(
        times, low, middle, high, tips, name="events per second over all recordings"
    )
    return (
        f'<figure><div class="scroll"><div class="wide">{chart}</div></div><figcaption>All recordings: the median, and the '
        "range that holds 80 % of them</figcaption></figure>"
    )


def counts_section(survey: Survey) -> str:
    counts, cutoff = survey.summary().counts, survey.cutoff
    cells, counting = int(counts.sum()), int(counts[1:].sum())
    if not counting:
        return ""
    shares = (100 * counts[1 : cutoff + 1] / counting).tolist()
    tips = [
        f"{count(counts[v])} cells count {v}{' (the cutoff: so many or more)' if v == cutoff else ''}: {share:.3g} %"
        for v, share in enumerate(shares, 1)
    ]
    ticks = [
        (float(t), f"{t:g}")
        for t in (range(1, cutoff + 1) if cutoff <= 20 else [*round_ticks(cutoff)[1:-1], cutoff])
    ]
    chart = histogram(
        [v + 0.5 for v in range(cutoff + 1)],
        shares,
        tips,
        name="cells by their count",
        unit=" %",
        x_label="events that a cell counts",
        y_label="share of the cells that count any",
        x_ticks=ticks,
        last=True,
    )
    sampled = sum(r.sampled_frames for r in survey.recordings)
    saturated = int(counts[cutoff:].sum())
    note = (
        f"{count(sampled)} decoded frames, up to {max(r.sampled_frames for r in survey.recordings)} of each recording: "
        f"{percent(counting / cells)} of their cells (pixel, time bin, polarity) count anything; "
        f"{percent(saturated / counting)} of these, {percent(saturated / cells)} of all, are at the cutoff of {cutoff}."
    )
    return section("Counts and saturation", "counts", f"<figure>{chart}</figure>", note)
