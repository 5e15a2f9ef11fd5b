#!/usr/bin/env python
"""dk-report, from a clone."""

from dk_detectron.commands.report import main

if __name__ == "__main__":
    main()
