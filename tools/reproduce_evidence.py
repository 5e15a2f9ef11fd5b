#!/usr/bin/env python
"""dk-reproduce-evidence, from a clone."""

from dk_detectron.commands.reproduce_evidence import main

if __name__ == "__main__":
    main()
