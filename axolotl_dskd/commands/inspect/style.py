"""The page's style sheet."""

CSS = """
:root{--bg:#fbfaf7;--fg:#1d2126;--soft:#5e6772;--line:#dcd9d0;--panel:#fff;
--exact:#0f766e;--exactbg:#d8f0ec;--group:#a15c07;--groupbg:#fbe9cc;--bad:#b42318;
--s1:#1d4e89;--s2:#2f6db5;--s3:#5b92d0;--s4:#8db4e2;--s5:#bdd3ee;
--t1:#7a4b9a;--t2:#9b6fb8;--t3:#c3a5d6;--p1:#0f766e;--p2:#3fa198;--p3:#86c9c2;--x1:#9aa0a6}
@media (prefers-color-scheme:dark){:root{--bg:#14171a;--fg:#e7e9ec;--soft:#a0a8b2;--line:#343a41;
--panel:#1c2024;--exact:#5fd4c6;--exactbg:#123c38;--group:#f0b562;--groupbg:#46320f;--bad:#ff8a7a;
--s1:#4f8fd6;--s2:#6ba3df;--s3:#88b7e7;--s4:#a5caef;--s5:#4a6785;
--t1:#b18ad0;--t2:#c5a6dd;--t3:#7b5c93;--p1:#5fd4c6;--p2:#8fe0d6;--p3:#35756e;--x1:#7d848b}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--fg);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:62rem;margin:0 auto;padding:1.2rem 1rem 4rem}
h1{font-size:clamp(1.2rem,3.5vw,1.8rem);line-height:1.25;margin:.6rem 0;overflow-wrap:anywhere}
h1 span{color:var(--soft)}h2{font-size:1.15rem;margin:0 0 .6rem}
h3{font-size:1rem;margin:1.1rem 0 .3rem;overflow-wrap:anywhere}
header p,figcaption,small,.notes{color:var(--soft)}
section{background:var(--panel);border:1px solid var(--line);border-radius:12px;
padding:1rem 1.1rem;margin:1rem 0}
p{margin:.5rem 0}code{font:.92em ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:.93rem}
th,td{text-align:left;vertical-align:top;padding:.35rem .5rem;border-top:1px solid var(--line);
overflow-wrap:anywhere}
th{font-weight:600;color:var(--soft);overflow-wrap:normal;min-width:5.5rem}tr:first-child>*{border-top:0}
.num{text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums}.wide{width:55%}
.bar{display:flex;height:1.1rem;border-radius:5px;overflow:hidden;background:var(--line)}
.bar span{display:block;height:100%;min-width:1px;box-shadow:inset -1px 0 0 var(--panel)}
.card{position:relative;margin:2rem 0 .8rem}.card .bar{height:2.2rem}
.card-line{position:absolute;top:-.5rem;bottom:-.5rem;border-left:2px dashed var(--fg)}
.card-line span{position:absolute;top:-1.25rem;right:0;white-space:nowrap;font-size:.82rem;
font-weight:600}
.keys{list-style:none;display:flex;flex-wrap:wrap;gap:.2rem 1.1rem;padding:0;margin:.5rem 0;
font-size:.9rem}
.dot{display:inline-block;width:.8em;height:.8em;border-radius:3px;margin-right:.4em}
.s1{background:var(--s1)}.s2{background:var(--s2)}.s3{background:var(--s3)}
.s4{background:var(--s4)}.s5{background:var(--s5)}.t1{background:var(--t1)}
.t2{background:var(--t2)}.t3{background:var(--t3)}.p1{background:var(--p1)}
.p2{background:var(--p2)}.p3{background:var(--p3)}.x1{background:var(--x1)}
.ok,.exact-bar{background:var(--p1)}.cut{background:var(--p3)}.bad{background:var(--bad)}
.group-bar{background:var(--group);opacity:.55}.phase{background:var(--x1)}.peak{background:var(--s1)}
.verdict{font-size:1.1rem;font-weight:650}.fits{color:var(--exact)}.over{color:var(--bad)}
figure{margin:1.2rem 0}figcaption{margin-bottom:.4rem;font-size:.93rem;overflow-wrap:anywhere}
.tokens{display:flex;flex-wrap:wrap;gap:.45rem .2rem;line-height:1.35}
.g{display:inline-flex;flex-direction:column;align-items:stretch;max-width:100%;
border-radius:6px;padding:.1rem .2rem;font-size:.86rem}
.legend .g{padding:.05rem .5rem}
.exact{background:var(--exactbg);border-bottom:2px solid var(--exact)}
.group{background:var(--groupbg);border-bottom:2px dashed var(--group)}
.text{text-align:center;font-weight:600;padding:0 .15rem;overflow-wrap:anywhere}
.row{display:flex;flex-wrap:wrap;justify-content:center;gap:2px;margin-top:2px}
.tok{background:var(--panel);border:1px solid var(--line);border-radius:4px;padding:0 .22rem;
min-width:.9rem;text-align:center;
font:.8rem/1.4 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;
overflow-wrap:anywhere}
.name{color:var(--soft);font-size:.68rem;line-height:1.65}
.sign{font-style:normal;color:var(--soft);opacity:.8;font-size:.85em}
@media (max-width:36rem){section{padding:.8rem .7rem}.wide{width:40%}}
@media print{body{background:#fff}section{break-inside:avoid}}
"""
