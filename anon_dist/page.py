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
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem; color: #222; background: #fff; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; margin: 1rem 0; }}
th, td {{ padding: .3rem .8rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap; }}
th {{ border-bottom-color: #888; }}
th:first-child, td:first-child {{ text-align: left; min-width: 7rem; max-width: 24rem; white-space: normal; overflow-wrap: anywhere; }}
img {{ max-width: 100%; height: auto; }}
pre {{ background: #f5f5f5; padding: .8rem; overflow-x: auto; font-size: 13px; line-height: 1.35; }}
code {{ background: #f5f5f5; overflow-wrap: anywhere; }}
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
