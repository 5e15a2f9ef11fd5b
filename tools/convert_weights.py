#!/usr/bin/env python
"""dk-convert-weights, from a clone."""

from dk_detectron.commands.convert_weights import main

if __name__ == "__main__":
    main()
