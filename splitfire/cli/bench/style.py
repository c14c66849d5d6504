"""The report's style: light or dark as the reader's system is, and paper. `--c` is a variant's colour, `--p` a phase's."""

STYLE = """
:root { color-scheme: light dark; --bg: #ffffff; --fg: #1b1f24; --muted: #5d6670; --line: #dfe3e8; --panel: #f6f7f9;
  --warn: #8a4b00; --warnbg: #fff4e0; --slo: #b4232f; --c0: #1f5fd6; --c1: #d0610a; --c2: #0a7d5f;
  --p0: #33658a; --p1: #86bbd8; --p2: #f2a541; --p3: #d1495b; --p4: #6a994e; --p5: #9b72aa; --p6: #8d99ae; --p7: #b08968; }
@media screen and (prefers-color-scheme: dark) {
  :root { --bg: #12151a; --fg: #e7eaee; --muted: #98a2ad; --line: #2c333c; --panel: #1a1f26;
    --warn: #ffc978; --warnbg: #33270f; --slo: #ff7b84; --c0: #6ea8ff; --c1: #ffa04d; --c2: #45d0a4;
    --p0: #5b8fb9; --p1: #a3d0ea; --p2: #ffc163; --p3: #ea7284; --p4: #8fbf72; --p5: #bd98cc; --p6: #a9b4c6; --p7: #cda883; } }
.c0 { --c: var(--c0); } .c1 { --c: var(--c1); } .c2 { --c: var(--c2); }
.p0 { --p: var(--p0); } .p1 { --p: var(--p1); } .p2 { --p: var(--p2); } .p3 { --p: var(--p3); }
.p4 { --p: var(--p4); } .p5 { --p: var(--p5); } .p6 { --p: var(--p6); } .p7 { --p: var(--p7); }
* { box-sizing: border-box; }
body { margin: 0; background: var(--bg); color: var(--fg); }
body { font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1088px; margin: 0 auto; padding: 28px 24px 60px; }
h1 { font-size: 25px; line-height: 1.25; margin: 0 0 6px; }
h2 { font-size: 17px; margin: 38px 0 2px; }
p { margin: 4px 0 10px; max-width: 88ch; }
.about, .none { color: var(--muted); font-size: 13.5px; }
.lead { font-size: 16px; max-width: 92ch; margin: 12px 0; }
.said { padding-left: 20px; margin: 10px 0 14px; max-width: 100ch; }
.said li { margin: 3px 0; }
.warn { background: var(--warnbg); color: var(--warn); border-left: 3px solid currentColor; padding: 8px 12px; margin: 8px 0; }
.cards { display: flex; flex-wrap: wrap; gap: 12px; margin: 16px 0 8px; }
.card { flex: 1 1 230px; background: var(--panel); border-top: 3px solid var(--c); border-radius: 4px; padding: 12px 16px; }
.card b { display: block; font-size: 26px; line-height: 1.2; font-weight: 650; }
.card span { color: var(--muted); font-size: 13px; }
.card .who { color: var(--c); font-weight: 600; font-size: 14px; }
.head { display: grid; grid-template-columns: max-content 1fr; gap: 2px 16px; margin: 14px 0; font-size: 13px; }
.head dt { color: var(--muted); }
.head dd { margin: 0; overflow-wrap: anywhere; }
.pictures { display: grid; gap: 8px 12px; }
.two { grid-template-columns: repeat(2, minmax(0, 1fr)); }
.three { grid-template-columns: repeat(3, minmax(0, 1fr)); }
@media screen and (max-width: 760px) { .two, .three { grid-template-columns: minmax(0, 1fr); } }
svg { max-width: 100%; height: auto; display: block; }
svg text { fill: var(--fg); font-size: 11.5px; font-variant-numeric: tabular-nums; }
svg .tick, svg .name, svg .label { fill: var(--muted); }
svg .name { font-size: 12px; }
svg .panel { font-weight: 600; font-size: 12.5px; }
svg .label { paint-order: stroke; stroke: var(--bg); stroke-width: 3px; }
svg .label.slo { fill: var(--slo); }
svg .grid { stroke: var(--line); }
svg .axis { stroke: var(--muted); }
svg .line { fill: none; stroke: var(--c); stroke-width: 2.2; stroke-linejoin: round; }
svg .thin { stroke-width: 1.2; stroke-dasharray: 6 3; }
svg .ideal { stroke: var(--muted); stroke-width: 1.2; stroke-dasharray: 5 4; }
svg line.slo, svg polyline.slo { stroke: var(--slo); stroke-width: 1.3; stroke-dasharray: 2 3; }
svg .band { fill: var(--c); opacity: .13; }
svg .whisker { stroke: var(--c); stroke-width: 1.6; }
svg .mark { fill: var(--c); stroke: var(--bg); stroke-width: 1; }
svg .hollow { fill: var(--bg); stroke: var(--c); stroke-width: 1.5; }
svg .fill { fill: var(--p); }
.swatch { display: inline-block; width: 11px; height: 11px; background: var(--p); }
.dot { display: inline-block; width: 8px; height: 8px; border-radius: 50%; margin-right: 6px; background: var(--c); }
.legend { display: flex; flex-wrap: wrap; gap: 2px 18px; margin: 8px 0 2px; font-size: 13px; }
.legend span { display: inline-flex; align-items: center; gap: 6px; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 12.5px; font-variant-numeric: tabular-nums; margin-top: 8px; width: 100%; }
th, td { padding: 4px 5px; text-align: right; white-space: nowrap; }
th { color: var(--muted); font-weight: 600; vertical-align: bottom; }
thead tr:last-child th { border-bottom: 1px solid var(--muted); }
thead .group { text-align: center; border-bottom: 1px solid var(--line); }
td.text, th.text { text-align: left; }
tr.first td { border-top: 1px solid var(--line); }
td.bad { color: var(--slo); font-weight: 600; }
@media print {
  @page { size: A4 landscape; margin: 12mm; }
  * { -webkit-print-color-adjust: exact; print-color-adjust: exact; }
  main { max-width: none; padding: 0; }
  body { font-size: 12px; }
  h2 { margin-top: 20px; break-after: avoid; }
  .tall { max-height: 72mm; }
  .about, .legend { break-after: avoid; }
  svg, .card, .warn, tr { break-inside: avoid; }
  th, td { padding: 2px 4px; }
  table { font-size: 10px; } }
"""
