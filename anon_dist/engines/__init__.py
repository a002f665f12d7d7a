"""Engines: how ranks share a model and its optimizer. Each wraps, checks what was wrapped, and says what went wrong.

Importing this package imports none of the engines' libraries; `register.register()` makes Anon known to them.
"""
