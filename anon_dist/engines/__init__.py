"""Engines: how ranks share a model and its optimizer. Each wraps, checks what was wrapped, and says what went wrong.

Importing this package imports none of the engines' libraries; `register.py` is what `import anon_dist` registers.
"""
