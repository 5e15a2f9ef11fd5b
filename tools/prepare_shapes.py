#!/usr/bin/env python
"""dk-prepare-shapes, from a clone."""

from dk_detectron.commands.prepare_shapes import main

if __name__ == "__main__":
    main()
