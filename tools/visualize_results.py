#!/usr/bin/env python
"""dk-visualize-results, from a clone."""

from dk_detectron.commands.visualize_results import main

if __name__ == "__main__":
    main()
