#!/usr/bin/env python
"""dk-visualize-erf, from a clone."""

from dk_detectron.commands.visualize_erf import main

if __name__ == "__main__":
    main()
