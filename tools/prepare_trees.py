#!/usr/bin/env python
"""dk-prepare-trees, from a clone."""

from dk_detectron.commands.prepare_trees import main

if __name__ == "__main__":
    main()
