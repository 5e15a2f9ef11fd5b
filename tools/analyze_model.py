#!/usr/bin/env python
"""dk-analyze-model, from a clone."""

from dk_detectron.commands.analyze_model import main

if __name__ == "__main__":
    main()
