#!/usr/bin/env python
"""dk-export, from a clone."""

from dk_detectron.commands.export import main

if __name__ == "__main__":
    main()
