"""The style sheet of the report: system fonts, light and dark by the reader's setting, one column on a phone."""

from ssod_fast.report.svg import css_variables

STYLE = (
    f"""
:root {{ color-scheme: light dark; {css_variables(dark=False)} --page: #f4f6f8; --code: #eef1f4; --good: #00694d;
    --bad: #b03a00; --warn: #fff4d6; --mark: #ffe9a8; }}
@media (prefers-color-scheme: dark) {{
  :root {{ {css_variables(dark=True)} --page: #10151c; --code: #262e39; --good: #4fd6a9; --bad: #ff9d66; --warn: #3a3115;
    --mark: #5a4a12; }}
}}
"""
    + """
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--page); color: var(--ink);
    font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 20px 16px 64px; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 8px 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 0 0 4px; }
h3 { font-size: 1rem; font-weight: 600; margin: 0 0 4px; overflow-wrap: anywhere; }
section, header { background: var(--surface); border: 1px solid var(--grid); border-radius: 10px; padding: 16px;
    margin-top: 16px; min-width: 0; }
p { margin: 6px 0; max-width: 90ch; }
ul { margin: 6px 0; padding-left: 1.2em; }
.verdict { font-size: 1.06rem; margin-top: 12px; }
.verdict li:first-child { font-weight: 600; }
.verdict li { margin: 4px 0; max-width: 95ch; overflow-wrap: anywhere; }
.note, .muted, figcaption { color: var(--muted); }
.note, figcaption { font-size: .85rem; }
.missing { color: var(--muted); }
section.missing { color: var(--ink); background: var(--warn); }
code { background: var(--code); border-radius: 4px; padding: 0 4px; font-size: .9em; overflow-wrap: anywhere; }
.swatch { display: inline-block; width: .8em; height: .8em; border-radius: 3px; margin-right: .45em; vertical-align: -.05em;
    flex: none; }
.legend { position: sticky; top: 0; z-index: 2; list-style: none; display: flex; flex-wrap: wrap; gap: 4px 18px;
    margin: 16px 0 0; padding: 8px 16px;
  background: var(--surface); border: 1px solid var(--grid); border-radius: 10px; }
.legend li { overflow-wrap: anywhere; }
.scroll { overflow-x: auto; margin: 8px 0; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 12px 5px 0; border-bottom: 1px solid var(--grid); vertical-align: top; text-align: left; }
thead th { color: var(--muted); font-weight: 600; white-space: nowrap; }
tbody th { font-weight: 500; }
.numbers td { white-space: nowrap; }
.numbers tbody th { white-space: nowrap; }
.facts { width: 100%; }
.facts td, .config td { overflow-wrap: anywhere; min-width: 9em; }
.facts tbody th { color: var(--muted); white-space: nowrap; }
.gap { font-size: .82em; margin-left: .2em; }
.gap.up { color: var(--good); } .gap.down { color: var(--bad); } .gap.same { color: var(--muted); }
mark { background: var(--mark); color: inherit; border-radius: 3px; padding: 0 3px; }
details { margin: 8px 0; }
summary { cursor: pointer; font-weight: 600; padding: 4px 0; }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 340px), 1fr)); gap: 20px 24px;
    margin-top: 12px; align-items: start; }
.panels figure, .mixed figure, .row figure { margin: 0; min-width: 0; }
.panels svg { display: block; width: 100%; height: auto; max-width: 460px; font-family: inherit; overflow: visible; }
.events { list-style: none; padding: 0; }
.events li { padding: 4px 8px; border-radius: 6px; margin: 3px 0; overflow-wrap: anywhere; }
.events .warning { background: var(--warn); }
.events .level { font-weight: 600; }
.switches { display: flex; flex-wrap: wrap; gap: 4px 20px; margin: 8px 0; }
.switches label { display: flex; align-items: center; gap: 6px; cursor: pointer; min-height: 28px; }
.row { display: grid; grid-template-columns: repeat(var(--columns, 4), minmax(0, 1fr)); gap: 10px; margin: 10px 0; }
.mixed { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 260px), 1fr)); gap: 12px; margin-top: 10px;
    align-items: start; }
.shot { display: block; width: 100%; height: auto; border-radius: 6px; background: #000; }
.shot rect { fill: none; vector-effect: none; }
.shot text { font-size: calc(11 * var(--unit)); font-family: system-ui, sans-serif; font-weight: 600;
    paint-order: stroke; stroke: rgba(0, 0, 0, .8);
    stroke-linejoin: round; }
.truth rect { stroke: #fff; filter: drop-shadow(0 0 1px #000); }
.store { position: absolute; width: 0; height: 0; overflow: hidden; }
.images:has(.show-teacher:not(:checked)) .teacher, .images:has(.show-student:not(:checked)) .student,
.images:has(.show-truth:not(:checked)) .truth { display: none; }
@media (max-width: 700px) {
  main { padding: 8px 8px 40px; }
  section, header { padding: 12px; border-radius: 8px; }
  .row { grid-template-columns: repeat(2, minmax(0, 1fr)); }
  .row figure:not(:first-of-type):not(:last-of-type) { display: none; }
  .shot text { font-size: calc(17 * var(--unit)); }
  .mixed { grid-template-columns: repeat(2, minmax(0, 1fr)); }
  .facts td { min-width: 8em; }
}
@media print { .legend { position: static; } section { break-inside: avoid-page; } }
"""
)
