#!/usr/bin/env python
"""dk-reproduce-tables, from a clone."""

from dk_detectron.commands.reproduce_tables import main

if __name__ == "__main__":
    main()
