"""A page that is one file: HTML with its style and its pictures inside, which asks for nothing else."""

from __future__ import annotations

import base64
import html

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --text: #222; --page: #fff; --line: #ddd; --head: #888; --code: #f5f5f5; --link: #0645ad; }}
@media (prefers-color-scheme: dark) {{
:root {{ --text: #ddd; --page: #1b1c1e; --line: #3a3c40; --head: #85888e; --code: #2a2c30; --link: #8ab4f8; }}
}}
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem;
  color: var(--text); background: var(--page); }}
a {{ color: var(--link); }}
h1, h2, p, li {{ overflow-wrap: anywhere; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; margin: 1rem 0; }}
th, td {{ padding: .3rem .8rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }}
th {{ border-bottom-color: var(--head); }}
th:first-child, td:first-child {{ text-align: left; min-width: 7rem; max-width: 24rem; white-space: normal; overflow-wrap: anywhere; }}
img {{ max-width: 100%; height: auto; background: #fff; }}
pre {{ background: var(--code); padding: .8rem; overflow-x: auto; font-size: 13px; line-height: 1.35; }}
code {{ background: var(--code); overflow-wrap: anywhere; }}
pre code {{ overflow-wrap: normal; }}
</style>
</head>
<body>
{body}
</body>
</html>
"""


def page(title: str, body: str) -> str:
    """The page.

    Args:
        title: plain text.
        body: HTML.
    """
    return PAGE.format(title=html.escape(title), body=body)


def picture(png: bytes, alt: str) -> str:
    """An `img` that holds its picture.

    Args:
        alt: plain text for those who do not see it.
    """
    return f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
