#!/usr/bin/env python
"""dk-check-dataset, from a clone."""

from dk_detectron.commands.check_dataset import main

if __name__ == "__main__":
    main()
