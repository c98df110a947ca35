"""From tables to people: the JSON document, CSV, text, figures and one HTML page.

Nothing here judges: what is said was decided in analysis, and each number can be found in its tables.
"""
