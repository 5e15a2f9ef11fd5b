"""Plants small faults in the sources, one at a time, and asks whether the tests see them.

sites.py        where a fault can be, and which
__main__.py     plants, runs the tests, reports (make mutants)
equivalent.json faults that change no result, each with its reason; `text` is the line, and if
                others are like it, `above` and `left` say which
"""
