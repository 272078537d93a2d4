"""The page's style sheet, and the script that sorts tables and enlarges pictures: the page is whole without it."""

CSS = """\
:root { color-scheme: light dark; --paper: #fff; --ink: #1c2430; --soft: #5d6878; --faint: #e3e7ed;
  --panel: #f6f8fa; --train: #2f6fdb; --val: #d9822b; --test: #1a9a83;
  --alert: #b45309; --alert-paper: #fff7e8; --fine: #e9f7f1; }
@media (prefers-color-scheme: dark) { :root { --paper: #14181e; --ink: #e4e8ee; --soft: #98a3b3; --faint: #2b323c;
  --panel: #1b2129; --train: #6ea0f5; --val: #eba45c; --test: #4cc3ac;
  --alert: #f2b35c; --alert-paper: #2b2316; --fine: #15291f; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.2rem clamp(1rem, 4vw, 3rem) 4rem; max-width: 84rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif; }
h1 { margin: 0; font-size: 1.8rem; line-height: 1.2; overflow-wrap: anywhere; }
h1 small { font-size: 1rem; font-weight: 400; color: var(--soft); }
h2 { margin: 0 0 .4rem; font-size: 1.2rem; }
h3 { margin: 0 0 .2rem; font-size: 1rem; }
header p { margin: .3rem 0 0; }
section { margin-top: 2.6rem; }
.note, figcaption { color: var(--soft); font-size: .87rem; }
p.note { margin: 0 0 .9rem; max-width: 62rem; }
#warnings { margin-top: 1.5rem; padding: .9rem 1.2rem; border-left: 4px solid var(--alert); border-radius: 4px;
  background: var(--alert-paper); }
#warnings h2 { font-size: 1rem; color: var(--alert); }
#warnings ul { margin: 0; padding-left: 1.1rem; overflow-wrap: anywhere; }
#warnings.fine { border-color: var(--test); background: var(--fine); }
#warnings.fine p { margin: 0; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: .8rem; margin: 1.5rem 0 0; }
.figures div { padding: .8rem 1rem; border-radius: 6px; background: var(--panel); }
.figures dt { color: var(--soft); font-size: .87rem; }
.figures dd { margin: 0; font-size: 1.55rem; font-weight: 600; line-height: 1.3; font-variant-numeric: tabular-nums; }
.figures dd.note { font-size: .82rem; font-weight: 400; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { padding: .28rem .65rem; text-align: left; white-space: nowrap; border-bottom: 1px solid var(--faint); font-weight: 400; }
thead th { white-space: normal; color: var(--soft); font-size: .8rem; vertical-align: bottom; }
thead th { border-bottom: 1.5px solid var(--soft); }
tbody tr:hover { background: var(--panel); }
tfoot th, tfoot td { font-weight: 600; border: 0; border-top: 1.5px solid var(--soft); }
.n { text-align: right; }
th[scope="row"] { position: sticky; left: 0; max-width: 24rem; overflow: hidden; text-overflow: ellipsis; background: inherit; }
tr { background: var(--paper); }
th small { color: var(--soft); }
th button { all: unset; cursor: pointer; }
th button:hover, th button:focus-visible { color: var(--train); text-decoration: underline; }
th[aria-sort] button { color: var(--ink); }
th[aria-sort="ascending"] button::after { content: " ▲"; }
th[aria-sort="descending"] button::after { content: " ▼"; }
.share { width: 7rem; }
.share div { height: .6rem; min-width: 1px; border-radius: 2px; background: var(--train); }
figure { margin: 0; }
.chart { display: block; width: 100%; height: auto; }
#sizes figure, #counts figure { max-width: 40rem; }
.wide { min-width: 44rem; }
.two { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(30rem, 100%), 1fr)); gap: 1.5rem 2.5rem;
  align-items: start; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(21rem, 100%), 1fr)); gap: 1.2rem 1.8rem; }
#events > figure { margin-bottom: 1.2rem; }
.key { margin-right: 1rem; }
.key::before { content: ""; display: inline-block; width: .75em; height: .75em; margin-right: .4em; border-radius: 2px;
  background: var(--train); }
.key.val::before { background: var(--val); }
.key.test::before { background: var(--test); }
svg text { fill: var(--soft); font-size: 11px; font-variant-numeric: tabular-nums; }
svg .row { fill: var(--ink); font-size: 12px; }
svg .end { text-anchor: end; }
svg .middle { text-anchor: middle; }
svg .grid { stroke: var(--faint); }
svg .base { stroke: var(--soft); }
svg .mark { stroke: var(--soft); stroke-dasharray: 4 3; }
svg .bar { fill: var(--train); }
svg .bar.val, svg .bar.apart { fill: var(--val); }
svg .bar.test { fill: var(--test); }
svg .bar:hover { opacity: .75; }
svg .area { fill: var(--train); fill-opacity: .28; stroke: var(--train); stroke-width: 1; }
svg polygon.area { stroke: none; }
svg .line { fill: none; stroke: var(--train); stroke-width: 1.5; stroke-linejoin: round; }
svg .rug { fill: var(--test); }
svg .hit { fill: transparent; }
svg .hit:hover { fill: var(--ink); fill-opacity: .12; }
.spark { display: block; width: 90px; height: 18px; }
.sheet { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(19rem, 100%), 1fr)); gap: 1rem; }
.sheet img { display: block; width: 100%; height: auto; border: 1px solid var(--faint); border-radius: 3px; cursor: zoom-in; }
.sheet .large { grid-column: 1 / -1; }
.sheet .large img { cursor: zoom-out; }
@media print {
  :root { color-scheme: light; --paper: #fff; --ink: #000; --soft: #444; --faint: #ccc; --panel: #f4f4f4; --train: #2f6fdb;
    --val: #d9822b; --test: #1a9a83; --alert: #8a4b00; --alert-paper: #fff; --fine: #fff; }
  body { padding: 0; max-width: none; font-size: 10pt; }
  figure, tr, .figures div, #warnings { break-inside: avoid; }
  h2 { break-after: avoid; }
  .scroll { overflow: visible; }
  .wide { min-width: 0; }
  h2 + .note { break-after: avoid; }
  .two { grid-template-columns: 1fr 1fr; gap: 1.2rem; }
  table { font-size: 7pt; }
  th, td { padding: .15rem .3rem; }
  th { white-space: normal; }
  thead th { font-size: 6.5pt; }
  .share { width: 3rem; }
  .sheet { grid-template-columns: repeat(3, 1fr); }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""

SCRIPT = """\
for (const button of document.querySelectorAll("th button")) button.onclick = () => {
  const th = button.parentNode, body = th.closest("table").tBodies[0], column = [...th.parentNode.children].indexOf(th);
  const down = th.getAttribute("aria-sort") === "descending" || (!th.hasAttribute("aria-sort") && th.className !== "n");
  for (const other of th.parentNode.children) other.removeAttribute("aria-sort");
  th.setAttribute("aria-sort", down ? "ascending" : "descending");
  const value = row => row.children[column].dataset.value ?? row.children[column].textContent;
  const number = text => text === "" ? -Infinity : Number(text);
  const compare = (a, b) => th.className !== "n" ? a.localeCompare(b, "en", {numeric: true})
    : a === b ? 0 : number(a) - number(b);
  const rows = [...body.rows].sort((a, b) => (down ? 1 : -1) * compare(value(a), value(b)));
  body.append(...rows);
};
for (const picture of document.querySelectorAll(".sheet img"))
  picture.onclick = () => picture.parentNode.classList.toggle("large");
"""
